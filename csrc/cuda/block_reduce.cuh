// Sums and maxima over a block's threads, in a fixed order.
#pragma once

#include "launch.h"

namespace wcmi {

template <typename T>
struct Sum {
  __device__ T operator()(T a, T b) const { return a + b; }
};

// The maximum, or NaN if one of both is.
template <typename T>
struct Largest {
  __device__ T operator()(T a, T b) const { return a != a || a > b ? a : b; }
};

// The combination of all threads' values, for every thread. Every thread of the block must call it;
// `shared` has room for one value per warp. blockDim.x is a multiple of 32.
template <typename T, typename Combine>
__device__ T block_reduce(T value, T* shared, Combine combine) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  const int warps = blockDim.x / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < warps; ++warp) value = combine(value, shared[warp]);
  return value;
}

}  // namespace wcmi
