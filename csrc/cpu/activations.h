// Activations as straight-line fp32 code that a compiler vectorises: `value(z)`, and `backward(z, g, dz)`, which returns the
// value and sets dz = g * act'(z).
//
// The formulas are those of aten, so that Inf and NaN come out where aten has them: silu(-Inf) is -Inf / Inf = NaN.

#pragma once

#include "common.h"

namespace peft_ops {

// within 1 ulp of exp(x): 2^n * p(r), x = n ln 2 + r, with Cephes' polynomial. NaN stays NaN.
PEFT_OPS_INLINE float exp_f32(float x) {
  constexpr float magic = 0x1.8p23f; // adding it rounds to an integer, on instruction sets without a rounding instruction too
  x = x > 89.0f ? 89.0f : x;         // exp(89) is Inf
  x = x < -104.0f ? -104.0f : x;     // exp(-104) is 0
  float shifted = x * 1.44269504f + magic;
  float n = shifted - magic;
  float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // two factors: 2^128 and the subnormals are out of reach of one
  int32_t whole = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(magic);
  int32_t half = whole >> 1;
  float first = bit_cast<float>((half + 127) * (1 << 23));
  float second = bit_cast<float>((whole - half + 127) * (1 << 23));
  return p * first * second;
}

// within 2 ulp of erf(x): an odd polynomial near 0, else 1 - exp(polynomial)
PEFT_OPS_INLINE float erf_f32(float x) {
  float t = x < 0.0f ? -x : x;
  t = t > 4.0f ? 4.0f : t; // erf(4) is 1 in fp32
  float s = t * t;
  float near = -5.96761703e-4f;
  near = near * s + 4.99119423e-3f;
  near = near * s + -2.67681349e-2f;
  near = near * s + 1.12819925e-1f;
  near = near * s + -3.76125336e-1f;
  near = near * s + 1.28379166e-1f;
  near = near * t + t;
  float far = -1.72853470e-5f * t + 3.83197126e-4f;
  far = far * s + (-3.88396438e-3f * t + 2.42546219e-2f);
  far = far * t + -1.06777877e-1f;
  far = far * t + -6.34846687e-1f;
  far = far * t + -1.28717512e-1f;
  far = far * t + -t;
  far = 1.0f - exp_f32(far);
  float magnitude = t > 0.927734375f ? far : near;
  return x < 0.0f ? -magnitude : magnitude;
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
    dz = z > 0.0f ? g : 0.0f; // a choice: g may be Inf
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
  PEFT_OPS_INLINE static float cdf(float z) {
    return 0.5f * (1.0f + erf_f32(z * 0.707106781f));
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
  PEFT_OPS_INLINE static float cdf(float z) {
    float twice = 1.59576912f * (z + 0.044715f * z * z * z);
    float e = exp_f32(twice < 0.0f ? twice : -twice);
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

} // namespace peft_ops
