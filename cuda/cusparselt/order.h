// The order of the library's compressed form. It is host code and kernels alike: a C++ compiler is
// enough to test it.
//
// The compressed form is the kept values of all rows, one row after another, and then the 2:4
// metadata: a nibble for each window of four columns, in an order of the library's own.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace slidejax::cusparselt {

// Where the nibble of a row's window is. It is a sum over the bits of both numbers, which describes
// every order that is made of tiles whose sizes are powers of two. layout.h finds the terms.
struct Layout {
  static constexpr int kBits = 24;
  int64_t base;  // of row 0, window 0; nibbles from the beginning of the metadata
  int64_t of_row[kBits], of_window[kBits];
  int64_t run;  // neighbouring windows of a row whose nibbles are neighbours too: 2, 4 or 8
};

// The sum of the terms of a number's bits.
SLIDEJAX_HOST_DEVICE inline int64_t SumOfBits(const int64_t* terms, uint32_t number) {
  int64_t sum = 0;
  for (int bit = 0; number >> bit; ++bit) sum += (number >> bit & 1) * terms[bit];
  return sum;
}

// Returns the largest run of neighbouring windows, up to a word of 8, whose nibbles are neighbours
// and whole bytes or words. 1 if there is none.
inline int64_t RunOf(const Layout& layout) {
  int64_t run = 1;
  for (int bit = 0; bit < 3 && layout.of_window[bit] == run; ++bit) run *= 2;
  const auto starts_runs = [&] {
    bool holds = layout.base % run == 0;
    for (int bit = 0; bit < Layout::kBits; ++bit) {
      holds = holds && layout.of_row[bit] % run == 0;
      if (int64_t{1} << bit >= run) holds = holds && layout.of_window[bit] % run == 0;
    }
    return holds;
  };
  while (run > 1 && !starts_runs()) run /= 2;
  return run;
}

// Nibble w of a group's metadata is first | second << 2, the places of the kept values 2 w and
// 2 w + 1 in window w. Value p is in column p, plus 1 if that reaches the first zero z1, plus 1 if
// it then reaches the second zero z2. So the places are 0 and 1, and each zero that a value has
// passed adds 1.
SLIDEJAX_HOST_DEVICE inline uint32_t MetadataOfGroup(uint32_t zeros, int windows) {
  const uint32_t mask = (1u << (4 * windows)) - 1, z1 = zeros & 15, z2 = zeros >> 4;
  return (0x4444444u & mask) + ((0x5555555u << (2 * z1)) & mask) +
         ((0x5555555u << (2 * ((z2 - 1) & 15))) & mask);
}

// Writes the metadata of 8 groups of a row, block number `block` of them. `zeros` holds a byte for
// each, the first one lowest.
SLIDEJAX_HOST_DEVICE inline void PackBlock(const Layout& layout, uint64_t zeros, int windows,
                                           uint32_t row, uint32_t block, uint8_t* metadata) {
  const int64_t of_row = layout.base + SumOfBits(layout.of_row, row);
  uint32_t window = block * 8 * windows;
  uint64_t nibbles = 0;
  int have = 0;  // of them
  for (int group = 0; group < 8; ++group, zeros >>= 8) {
    nibbles |= static_cast<uint64_t>(MetadataOfGroup(zeros & 255, windows)) << (4 * have);
    for (have += windows; have >= 8; have -= 8, nibbles >>= 32, window += 8) {
      for (int done = 0; done < 8; done += static_cast<int>(layout.run)) {
        uint8_t* to = metadata + (of_row + SumOfBits(layout.of_window, window + done)) / 2;
        const uint32_t word = static_cast<uint32_t>(nibbles) >> (4 * done);
        if (layout.run == 8)
          *reinterpret_cast<uint32_t*>(to) = word;
        else if (layout.run == 4)
          *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(word);
        else
          *to = static_cast<uint8_t>(word);
      }
    }
  }
}

}  // namespace slidejax::cusparselt
