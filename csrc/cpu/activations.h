// Activations as straight-line fp32 code that a compiler vectorises: `value(z)`, and `backward(z, g, dz)`, which returns the
// value and sets dz = g * act'(z).
//
// The formulas are those of aten, so that Inf and NaN come out where aten has them: silu(-Inf) is -Inf / Inf = NaN.

#pragma once

#include "common.h"

namespace peft_ops {

// exp(x) for -87 < x < 88, within 1 ulp: 2^n * p(r), x = n ln 2 + r, with Cephes' polynomial, summed in pairs: 6 % less time for
// silu than one term after the other
PEFT_OPS_INLINE float exp_inside(float x) {
  constexpr float magic = 0x1.8p23f; // adding it rounds to an integer, on instruction sets without a rounding instruction too
  float shifted = x * 1.44269504f + magic;
  float n = shifted - magic;
  float r = (x - n * 0.693359375f) - n * -2.12194440e-4f, r2 = r * r;
  float p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r2 + (8.3334519073e-3f * r + 4.1665795894e-2f);
  p = p * r2 + (1.6666665459e-1f * r + 5.0000001201e-1f);
  p = p * r2 + r + 1.0f;
  return bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23));
}

// exp(x); 0 where it would be subnormal, Inf from 2^127.99 on, NaN for NaN
PEFT_OPS_INLINE float exp_f32(float x) {
  float e = exp_inside(x);
  e = x < -87.0f ? 0.0f : e;
  return x < 88.72f ? e : x + __builtin_inff();
}

struct Identity {
  PEFT_OPS_INLINE static float value(float z) {
    return z;
  }
  PEFT_OPS_INLINE static float backward(float z, float g, float& dz) {
    dz = g;
    return z;
  }
};

struct Relu {
  PEFT_OPS_INLINE static float value(float z) {
    return z < 0.0f ? 0.0f : z;
  }
  PEFT_OPS_INLINE static float backward(float z, float g, float& dz) {
    dz = bit_cast<float>(bit_cast<uint32_t>(g) & (z <= 0.0f ? 0u : ~0u)); // a choice, since g may be Inf; NaN lets it through
    return value(z);
  }
};

struct Silu {
  PEFT_OPS_INLINE static float value(float z) {
    return z / (1.0f + exp_f32(-z));
  }
  PEFT_OPS_INLINE static float backward(float z, float g, float& dz) {
    float s = 1.0f / (1.0f + exp_f32(-z));
    dz = g * (s * (1.0f + z * (1.0f - s)));
    return z * s;
  }
};

struct Gelu {
  // The normal distribution's tail as 0.5 exp(polynomial), fitted to within 3e-10 up to 6, where the tail is 1e-9 and 0 from
  // there on. A single exp takes 3/4 of the time of an erf with its two polynomials.
  PEFT_OPS_INLINE static float cdf(float z) {
    float t = z < 0.0f ? -z : z;
    float p = -3.78495351e-08f;
    p = p * t + 9.45090619e-07f;
    p = p * t + -1.04228066e-05f;
    p = p * t + 6.51016308e-05f;
    p = p * t + -2.23677765e-04f;
    p = p * t + 4.25134167e-05f;
    p = p * t + 4.78161732e-03f;
    p = p * t + -3.63362841e-02f;
    p = p * t + -3.18309635e-01f;
    p = p * t + -7.97884583e-01f;
    float e = exp_inside(p * t);
    e = t > 6.0f ? 0.0f : e;
    return z < 0.0f ? 0.5f * e : 1.0f - 0.5f * e;
  }
  PEFT_OPS_INLINE static float value(float z) {
    return z * cdf(z);
  }
  PEFT_OPS_INLINE static float backward(float z, float g, float& dz) {
    float p = cdf(z);
    dz = g * (p + z * (0.398942280f * exp_f32(-0.5f * z * z)));
    return z * p;
  }
};

struct GeluTanh {
  // 0.5 (1 + tanh u) with e = exp(-2 |u|), so that nothing overflows. Near 0 from tanh |u| = (1 - e) / (1 + e), where the
  // subtraction is exact; farther out from the tail e / (1 + e). One form alone has 1.25 times aten's rms error somewhere.
  // A tail below 1e-12 is 0: 1 + tanh is 0 there in fp32, and soon in fp64.
  PEFT_OPS_INLINE static float cdf(float z) {
    float twice = 1.59576912f * (z + 0.044715f * z * z * z);
    float distance = twice < 0.0f ? -twice : twice;
    float e = exp_inside(-distance);
    e = distance > 27.6f ? 0.0f : e;
    bool far = e < 0.3f;
    float q = (far ? e : 1.0f - e) / (1.0f + e);
    float above = far ? 1.0f - q : 0.5f * (1.0f + q);
    float below = far ? q : 0.5f * (1.0f - q);
    return twice < 0.0f ? below : above;
  }
  PEFT_OPS_INLINE static float value(float z) {
    return z * cdf(z);
  }
  PEFT_OPS_INLINE static float backward(float z, float g, float& dz) {
    float s = cdf(z);
    dz = g * (s + z * s * (1.0f - s) * (1.59576912f * (1.0f + 0.134145f * z * z)));
    return z * s;
  }
};

// One of the kernels for None, relu, silu, gelu and gelu_tanh, which stand in this order.
template <class Kernels>
const Kernels& find_kernels(const char* op, const std::optional<std::string>& activation, const Kernels (&kernels)[5]) {
  constexpr const char* names[] = {"relu", "silu", "gelu", "gelu_tanh"};
  if (!activation)
    return kernels[0];
  for (int i = 0; i < 4; i++)
    if (*activation == names[i])
      return kernels[i + 1];
  STD_TORCH_CHECK(false, op, ": activation must be None, relu, gelu, gelu_tanh or silu, got ", *activation);
}

} // namespace peft_ops
