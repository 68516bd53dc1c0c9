// What tests/cuda/test_order.py calls. It is compiled with nothing but the host's C++ compiler.
#include "cusparselt/order.h"

using slidejax::cusparselt::Layout;

extern "C" {

int64_t run_of(const Layout& layout) { return slidejax::cusparselt::RunOf(layout); }

void pack(const Layout& layout, const uint64_t* zeros, int windows, int rows, int blocks,
          uint8_t* metadata) {
  for (int row = 0; row < rows; ++row) {
    for (int block = 0; block < blocks; ++block)
      slidejax::cusparselt::PackBlock(layout, *zeros++, windows, row, block, metadata);
  }
}

}  // extern "C"
