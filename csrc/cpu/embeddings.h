// What the prompt operators share: rows of embeddings written slot by slot, with what is added to each, and their gradient's sums.

#pragma once

#include "common.h"

namespace peft_ops {

// A 3-D tensor whose last dimension is contiguous; strides in bytes.
struct Cube {
  char* data;
  int64_t size0, size1, cols, stride0, stride1;
  Dtype dtype;

  char* row(int64_t i, int64_t j) const {
    return data + i * stride0 + j * stride1;
  }
};

Cube float_cube(const char* op, const char* arg, const Tensor& t);

// Contiguous integers of a width that the output keeps; null data for none.
struct Integers {
  const char* data;
  int64_t size;

  int64_t operator[](int64_t i) const {
    switch (size) {
      case 8:
        return reinterpret_cast<const int64_t*>(data)[i];
      case 4:
        return reinterpret_cast<const int32_t*>(data)[i];
      default:
        return reinterpret_cast<const uint8_t*>(data)[i];
    }
  }

  void set(char* out, int64_t i, int64_t value) const {
    switch (size) {
      case 8:
        reinterpret_cast<int64_t*>(out)[i] = value;
        break;
      case 4:
        reinterpret_cast<int32_t*>(out)[i] = int32_t(value);
        break;
      default:
        reinterpret_cast<uint8_t*>(out)[i] = uint8_t(value);
    }
  }
};

Integers check_integers(
    const char* op, const char* arg, const std::optional<Tensor>& t, std::initializer_list<int64_t> sizes, bool may_be_bool = false);

// table[ids[slot]], added to each slot where it is present
struct Added {
  bool present;
  Ids ids;
  Rows table;

  // null for an id outside the table
  const char* row(int64_t slot) const {
    int64_t id = ids[slot];
    return id >= 0 && id < table.rows ? table.row(id) : nullptr;
  }
};

Added check_added(
    const char* op,
    const char* ids_arg,
    const std::optional<Tensor>& ids,
    const char* arg,
    const std::optional<Tensor>& table,
    int64_t slots,
    int64_t E);

// out[slot] = (from * scale + types) + positions, in fp32 and rounded once; a copy where there is nothing to do.
struct SlotWriter {
  char* out;
  int64_t E;
  Dtype dtype;
  Added types, positions;

  // from: E elements, null for zeros
  void write(int64_t slot, Dtype from_dtype, const char* from, float scale = 1.0f) const;

  void write_nan(int64_t slot) const {
    fill_nan(dtype, out + slot * E * item_size(dtype), E);
  }
};

// dprompts[r] = sum of dout's slots whose bucket is r, in their order; fp32 [num_tasks, P, E]. bucket: one per slot, -1 for none.
Tensor sum_slots(const Cube& dout, const std::vector<int64_t>& bucket, int64_t num_tasks, int64_t P);

} // namespace peft_ops
