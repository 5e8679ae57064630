// Rows of fp16 and bf16 to fp32 and back.

#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define PEFT_OPS_F16C 1
#endif

namespace peft_ops {

namespace {

// fp16 without F16C: the exponent is rebased by a multiplication with 2^112, which is exact for subnormals too
PEFT_OPS_CLONES void half_to_float(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t magnitude = uint32_t(from[i] & 0x7fff) << 13;
    uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    uint32_t special = magnitude | 0x7f800000;
    uint32_t sign = uint32_t(from[i] & 0x8000) << 16;
    to[i] = bit_cast<float>(sign | (magnitude >= 0x0f800000 ? special : finite));
  }
}

// Rounding happens in an fp32 addition: `base` is the power of two whose last bit is worth fp16's last bit at v.
PEFT_OPS_CLONES void float_to_half(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = bit_cast<uint32_t>(from[i]);
    uint32_t magnitude = bits & 0x7fffffff;
    // up to 2^112 and back: what fp16 cannot hold becomes Inf on the way
    float v = (bit_cast<float>(magnitude) * 0x1p112f) * 0x1p-110f;
    uint32_t exponent = magnitude & 0x7f800000;
    exponent = exponent < 0x38800000 ? 0x38800000 : exponent;
    float base = bit_cast<float>(exponent + 0x07800000);
    uint32_t sum = bit_cast<uint32_t>(base + v);
    uint32_t half = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
    to[i] = uint16_t(((bits >> 16) & 0x8000) | (magnitude > 0x7f800000 ? 0x7e00 : half));
  }
}

#ifdef PEFT_OPS_F16C
const bool has_f16c = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");

__attribute__((target("avx,f16c"))) void half_to_float_f16c(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < n; i++)
    to[i] = _cvtsh_ss(from[i]);
}

__attribute__((target("avx,f16c"))) void float_to_half_f16c(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; i++)
    to[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}
#endif

PEFT_OPS_CLONES void bfloat_to_float(const BF16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    to[i] = load(from[i]);
}

PEFT_OPS_CLONES void float_to_bfloat(const float* __restrict from, BF16* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    store(to + i, from[i]);
}

} // namespace

void to_float(Dtype dtype, const void* from, float* to, int64_t n) {
  if (dtype == Dtype::F32) {
    std::memcpy(to, from, n * 4);
  } else if (dtype == Dtype::BF16) {
    bfloat_to_float(static_cast<const BF16*>(from), to, n);
  } else {
    auto convert = half_to_float;
#ifdef PEFT_OPS_F16C
    convert = has_f16c ? half_to_float_f16c : half_to_float;
#endif
    convert(static_cast<const uint16_t*>(from), to, n);
  }
}

void from_float(Dtype dtype, const float* from, void* to, int64_t n) {
  if (dtype == Dtype::F32) {
    std::memcpy(to, from, n * 4);
  } else if (dtype == Dtype::BF16) {
    float_to_bfloat(from, static_cast<BF16*>(to), n);
  } else {
    auto convert = float_to_half;
#ifdef PEFT_OPS_F16C
    convert = has_f16c ? float_to_half_f16c : float_to_half;
#endif
    convert(from, static_cast<uint16_t*>(to), n);
  }
}

void fill_nan(Dtype dtype, void* to, int64_t n) {
  if (dtype == Dtype::F32)
    std::fill_n(static_cast<uint32_t*>(to), n, 0x7fc00000u);
  else
    std::fill_n(static_cast<uint16_t*>(to), n, uint16_t(dtype == Dtype::BF16 ? 0x7fc0 : 0x7e00));
}

} // namespace peft_ops
