// Element types of both libraries, without torch: the CUDA sources do not include its headers.

#pragma once

#include <cstdint>

namespace peft_ops {

enum class Dtype { F32, F16, BF16 };

inline int64_t item_size(Dtype dtype) {
  return dtype == Dtype::F32 ? 4 : 2;
}

constexpr int64_t kBase = -1, kBad = -2; // what a checked id says beside a task

} // namespace peft_ops
