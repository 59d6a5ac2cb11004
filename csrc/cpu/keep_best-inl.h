// Body of keep_best, compiled once per instruction set; see kernels.h for what it computes.
// The including file defines WCMI_LEVEL.
#include <stdint.h>
#include <string.h>

#include "../kernels.h"

namespace wcmi {
namespace WCMI_LEVEL {

#include "storage-inl.h"

static constexpr int64_t kParallelBytes = 1 << 18;
static constexpr int64_t kChunkBytes = 1 << 16;  // long rows are copied by several threads

template <typename T>
static inline bool is_better(T value, T best) {
  return value > best || (best != best && value == value);
}

template <typename S>
static void keep_best_as(char* best_x, void* best_value, const char* x, const void* value,
                         int64_t rows, int64_t row_bytes, int threads) {
  typedef typename S::Element E;
  E* best = static_cast<E*>(best_value);
  const E* candidate = static_cast<const E*>(value);
  const int64_t chunks = (row_bytes + kChunkBytes - 1) / kChunkBytes;
#pragma omp parallel for num_threads(threads) \
    schedule(static) if (rows * row_bytes > kParallelBytes)
  for (int64_t task = 0; task < rows * chunks; ++task) {
    const int64_t row = task / chunks;
    const int64_t at = task % chunks * kChunkBytes;
    const int64_t size = row_bytes - at < kChunkBytes ? row_bytes - at : kChunkBytes;
    if (is_better(S::widen(candidate[row]), S::widen(best[row]))) {
      memcpy(best_x + row * row_bytes + at, x + row * row_bytes + at, static_cast<size_t>(size));
    }
  }
  // After all copies: threads that share a row compare with the same best value.
  for (int64_t row = 0; row < rows; ++row) {
    if (is_better(S::widen(candidate[row]), S::widen(best[row]))) best[row] = candidate[row];
  }
}

static void keep_best(void* best_x, void* best_value, const void* x, const void* value,
                      int64_t rows, int64_t row_bytes, int value_dtype, int threads) {
  char* to = static_cast<char*>(best_x);
  const char* from = static_cast<const char*>(x);
  switch (value_dtype) {
    case kFloat32:
      return keep_best_as<Float32>(to, best_value, from, value, rows, row_bytes, threads);
    case kFloat64:
      return keep_best_as<Float64>(to, best_value, from, value, rows, row_bytes, threads);
    case kBFloat16:
      return keep_best_as<BFloat16>(to, best_value, from, value, rows, row_bytes, threads);
    case kFloat16:
      return keep_best_as<Float16>(to, best_value, from, value, rows, row_bytes, threads);
  }
}

void fill_keep_best(CpuKernels* kernels) { kernels->keep_best = keep_best; }

}  // namespace WCMI_LEVEL
}  // namespace wcmi
