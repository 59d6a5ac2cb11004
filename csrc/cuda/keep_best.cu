// CUDA form of keep_best; see kernels.h for what it computes. Two launches: a row's values change
// only when every block has compared them.
#include "storage.cuh"

namespace wcmi {
namespace {

constexpr int kThreads = 256;

template <typename S>
__device__ bool is_better(const typename S::Element* value, const typename S::Element* best,
                          int64_t row) {
  const typename S::Wide own = S::widen(value[row]), other = S::widen(best[row]);
  return own > other || (other != other && own == own);
}

// Rows of `size` words.
template <typename S, typename Word>
__global__ void keep_rows_kernel(Word* best_x, const typename S::Element* best_value, const Word* x,
                                 const typename S::Element* value, int64_t rows, int64_t size) {
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    if (!is_better<S>(value, best_value, row)) continue;
    for (int64_t i = thread_index(); i < size; i += thread_count()) {
      best_x[row * size + i] = x[row * size + i];
    }
  }
}

template <typename S>
__global__ void keep_values_kernel(typename S::Element* best_value,
                                   const typename S::Element* value, int64_t rows) {
  for (int64_t row = thread_index(); row < rows; row += thread_count()) {
    if (is_better<S>(value, best_value, row)) best_value[row] = value[row];
  }
}

template <typename S, typename Word>
void launch_rows(void* best_x, const void* best_value, const void* x, const void* value,
                 int64_t rows, int64_t row_bytes, cudaStream_t stream) {
  typedef typename S::Element E;
  constexpr int64_t kMaxRows = 65535;
  const int64_t size = row_bytes / static_cast<int64_t>(sizeof(Word));
  const dim3 grid(blocks_for(size, kThreads),
                  static_cast<unsigned>(rows < kMaxRows ? rows : kMaxRows));
  WCMI_LAUNCH((keep_rows_kernel<S, Word>), grid, kThreads, 0, stream, static_cast<Word*>(best_x),
              static_cast<const E*>(best_value), static_cast<const Word*>(x),
              static_cast<const E*>(value), rows, size);
}

template <typename S>
int launch(void* best_x, void* best_value, const void* x, const void* value, int64_t rows,
           int64_t row_bytes, cudaStream_t stream) {
  typedef typename S::Element E;
  if (row_bytes > 0) {
    const bool vector = aligned(best_x) && aligned(x) && row_bytes % 16 == 0;
    const auto rows_of = vector ? launch_rows<S, uint4> : launch_rows<S, uint16_t>;
    rows_of(best_x, best_value, x, value, rows, row_bytes, stream);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  WCMI_LAUNCH((keep_values_kernel<S>), blocks_for(rows, kThreads), kThreads, 0, stream,
              static_cast<E*>(best_value), static_cast<const E*>(value), rows);
  return cudaGetLastError();
}

}  // namespace

int keep_best_cuda(void* best_x, void* best_value, const void* x, const void* value, int64_t rows,
                   int64_t row_bytes, int value_dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (rows == 0) return cudaSuccess;
  return for_storage(value_dtype, [=](auto storage) {
    return launch<decltype(storage)>(best_x, best_value, x, value, rows, row_bytes,
                                     static_cast<cudaStream_t>(stream));
  });
}

}  // namespace wcmi
