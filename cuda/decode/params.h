// The parameters of the decode kernels.
#pragma once

#include "decode/decode.h"

namespace slidejax::decode {

struct Params {
  DecodeArgs a;
  int tiles_each, tiles_more;  // tiles of a block; the first tiles_more blocks have one more
  int warps;                   // that multiply; the others only convert x
  int steps, slices, slice_steps, tile_slots, sums_bytes;
  int log_share;     // of RowShare
  bool cached;       // of Plan: blocks with a tile less than others must not decide for themselves
  bool behind;       // whether x is written by a kernel ahead that may still run
  int row_pieces;    // a block's rows of x in pieces of 16 bytes, if they lie in shared memory
  int block_rows;    // of GemvPlan and SkinnyPlan
  int group_rows;    // rows of x that a thread block multiplies, in SkinnyKernel
  int tile_outputs;  // half as many as rows of a tile, where a gate and its factor are two rows
  int tile_blocks;   // blocks of the weight from a tile to the next one
  int lower_zeros;   // bytes of zeros from row 0 of a tile to row 8
  // What QuantiseAhead writes, or null: the decode kernel quantises x itself.
  uint8_t* codes;
  float* scale_x;
};

}  // namespace slidejax::decode
