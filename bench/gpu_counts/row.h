// Logits that the emulated kernels process.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

// An aligned row of bfloat16 logits, 10 + 4 times a nearly normal variable, which is the same with every library.
class Row {
 public:
  explicit Row(int64_t size) : memory_(size / 8 + 1) {
    std::mt19937 random(1);
    for (int64_t i = 0; i < size; ++i) {
      double x = 10 - 4 * 6.0;
      for (int j = 0; j < 12; ++j) x += 4 * (random() / 4294967296.0);
      const float rounded = float(x);
      uint32_t bits;
      memcpy(&bits, &rounded, 4);
      data()[i] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
  }
  uint16_t* data() { return reinterpret_cast<uint16_t*>(memory_.data()); }

 private:
  std::vector<uint4> memory_;
};
