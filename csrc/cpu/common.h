// What the CPU kernels share: instruction-set dispatch, element types, checked views of tensors, ids.

#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "../dtype.h"
#include "ops.h"

// The same loop compiled for three instruction sets, of which the loader picks one. That needs ifunc, hence glibc, and clones of
// templates, hence GCC; elsewhere CXXFLAGS="-march=..." chooses.
#ifndef PEFT_OPS_CLONES
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define PEFT_OPS_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define PEFT_OPS_CLONES
#endif
#endif
#define PEFT_OPS_INLINE inline __attribute__((always_inline))

namespace peft_ops {

struct BF16 {
  uint16_t bits;
};

// elements that one thread handles at least: 4 us of the cheapest kernel, about what waking a second thread costs
constexpr int64_t kGrain = 65536;
// columns that pass through an fp32 buffer at a time: 4 KiB, several of which stay in L1
constexpr int64_t kBlock = 1024;

template <class To, class From>
PEFT_OPS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

PEFT_OPS_INLINE float load(float v) {
  return v;
}

PEFT_OPS_INLINE float load(BF16 v) {
  return bit_cast<float>(uint32_t(v.bits) << 16);
}

PEFT_OPS_INLINE void store(float* to, float v) {
  *to = v;
}

// round to nearest, ties to even; NaN keeps no payload, so that the carry cannot turn it into Inf
PEFT_OPS_INLINE void store(BF16* to, float v) {
  uint32_t bits = bit_cast<uint32_t>(v);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = v != v ? 0x7fc0 : uint16_t(rounded);
}

// convert.cpp
void to_float(Dtype dtype, const void* from, float* to, int64_t n);
void from_float(Dtype dtype, const float* from, void* to, int64_t n);
void fill_nan(Dtype dtype, void* to, int64_t n);

// A tensor whose last dimension is contiguous, seen as rows. The row stride is in bytes.
struct Rows {
  char* data;
  int64_t rows, cols, stride;
  Dtype dtype;

  char* row(int64_t m) const {
    return data + m * stride;
  }
};

std::string shape_of(torch::headeronly::IntHeaderOnlyArrayRef sizes);
inline std::string shape_of(const Tensor& t) {
  return shape_of(t.sizes());
}
Dtype float_dtype(const char* op, const char* arg, const Tensor& t);
Rows float_rows(const char* op, const char* arg, const Tensor& t);
Rows batch_rows(const char* op, const char* arg, const Tensor& t); // may have more than two dimensions, if contiguous
Tensor empty(
    const int64_t* sizes, int64_t dim, torch::headeronly::ScalarType dtype, int32_t device_type, int32_t device_index);
Tensor contiguous_like(const Tensor& t);

inline Tensor empty(
    std::initializer_list<int64_t> sizes,
    torch::headeronly::ScalarType dtype,
    int32_t device_type = aoti_torch_device_type_cpu(),
    int32_t device_index = 0) {
  return empty(sizes.begin(), sizes.size(), dtype, device_type, device_index);
}

// int32 or int64 ids in flattened order
struct Ids {
  const char* data;
  int64_t size, stride;
  bool wide;

  int64_t operator[](int64_t i) const {
    // volatile: what was checked is what is used, even where another thread writes the ids meanwhile
    const char* at = data + i * stride;
    return wide ? *reinterpret_cast<const volatile int64_t*>(at) : *reinterpret_cast<const volatile int32_t*>(at);
  }
};

Ids int_ids(const char* op, const char* arg, const Tensor& t);

} // namespace peft_ops
