// The row codec of the store (slimkernels/store/FORMAT.md): Elias-Fano ids, quantised logits, row checksums. Plain
// C++17 on raw pointers, little-endian. Input is not trusted: a row of malicious bytes is reported as a fault and never
// leads to a read or write out of bounds.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "elias_fano.h"

namespace slimkernels::store {

enum class Codec { kAffine8, kAffine6, kBfloat16, kFloat32 };

// Returns the number of bytes of the values of a row of n entries.
int64_t row_value_bytes(Codec codec, int64_t n);

// Returns the position of the values of a row in a ragged shard; `entry` is the number of entries before the row.
int64_t ragged_value_offset(Codec codec, int64_t row, int64_t entry);

// The encoded rows of one shard. If `top_k` > 0, every row keeps top_k entries and the offsets are null. If `top_k` is
// 0, the shard is ragged: the entries of row r are [entry_offsets[r], entry_offsets[r + 1]), and likewise its words.
struct ShardRows {
  int64_t rows;
  int64_t top_k;
  int64_t num_temperatures;
  const int64_t* entry_offsets;    // (rows + 1) or null
  const int64_t* id_word_offsets;  // (rows + 1) or null
  const uint32_t* id_words;
  int64_t num_id_words;
  const uint8_t* values;
  int64_t num_value_bytes;
  const float* affine;        // (rows, 2) scale, zero; null unless the codec is affine
  const float* lse;           // (rows, num_temperatures)
  const float* rest_lse;      // (rows, num_temperatures); null if the shard has none
  const float* target_logit;  // (rows)
  const uint64_t* checksums;  // (rows)
};

// Decodes rows [first, first + count) into ids and logits (count, width), padded with -1 and 0. Returns the first bad
// row and stores its fault in *fault, or returns -1. The output of the rows before it is complete.
int64_t decode_rows(const ShardRows& shard, Codec codec, int64_t vocab_size, int64_t first, int64_t count,
                    int64_t width, int32_t* ids, float* logits, RowFault* fault);

// The outputs of encode_rows. Sizes follow from the offsets, which the caller computes with row_layout. The values of
// consecutive rows have no gap between them.
struct EncodedRows {
  const int64_t* entry_offsets;    // (count + 1)
  const int64_t* id_word_offsets;  // (count + 1)
  uint32_t* id_words;
  int64_t num_id_words;
  uint8_t* values;
  int64_t num_value_bytes;
  float* affine;  // (count, 2); null unless the codec is affine
  uint64_t* checksums;
};

// Encodes ids and logits (count, width), with rows padded with -1; the first row is row `first` of its shard.
// `rest_lse` (count, num_temperatures) is only checked, and may be null; the checksums are those of rows without it.
// Returns the first row that cannot be stored and stores its fault in *fault, or returns -1.
int64_t encode_rows(const int32_t* ids, const float* logits, const float* lse, const float* rest_lse,
                    const float* target_logit, int64_t first, int64_t count, int64_t width, int64_t num_temperatures,
                    Codec codec, int64_t vocab_size, const EncodedRows& out, RowFault* fault);

// Adds store_encode_rows, store_decode_rows and store_checksums_with_rest to a module.
void bind_store_codec(pybind11::module_& m);

}  // namespace slimkernels::store

using slimkernels::store::bind_store_codec;
