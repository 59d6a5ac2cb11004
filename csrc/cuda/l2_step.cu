// CUDA form of l2_step; see kernels.h for what it computes. One block does a row, in float, or in
// double for double; it reads the row several times, from the first-level cache where it fits.
#include "block_reduce.cuh"
#include "storage.cuh"

namespace wcmi {
namespace {

constexpr int kThreads = 512;

// A vector's direction is v / largest / norm. Divided by the largest magnitude first, squares stay
// in range. Infinities outweigh the rest: they count as +-1, the rest as 0.
template <typename T>
struct Direction {
  T largest, norm;

  __device__ T reduced(T v) const {
    if (isinf(largest)) return isinf(v) ? copysign(T(1), v) : T(0);
    return largest == 0 ? v : v / largest;
  }
  // The norm of what is not 0 is at least 1.
  __device__ T operator()(T v) const { return reduced(v) / (norm < 1 ? T(1) : norm); }
  __device__ T length() const { return largest * norm; }
};

// The same run of elements of the three rows.
template <typename S, int kCount>
struct Run {
  Pack<S, kCount> x, grad, origin;
};

template <typename S>
struct Row {
  typename S::Element* x;
  const typename S::Element *grad, *origin;
  int64_t size;
};

// Calls use(run, first element) for this thread's runs of the row.
template <typename S, int kCount, typename Use>
__device__ void for_runs(const Row<S>& row, Use use) {
  for (int64_t i = threadIdx.x * kCount; i < row.size;
       i += static_cast<int64_t>(blockDim.x) * kCount) {
    use(Run<S, kCount>{load_pack<S, kCount>(row.x + i), load_pack<S, kCount>(row.grad + i),
                       load_pack<S, kCount>(row.origin + i)},
        i);
  }
}

// The direction of the vector whose element k of a run is value(run, k).
template <typename S, int kCount, typename Value>
__device__ Direction<typename S::Wide> direction_of(const Row<S>& row, typename S::Wide* shared,
                                                    Value value) {
  typedef typename S::Wide T;
  Direction<T> result = {0, 0};
  for_runs<S, kCount>(row, [&](const Run<S, kCount>& run, int64_t) {
    for (int k = 0; k < kCount; ++k) {
      result.largest = Largest<T>()(result.largest, abs(value(run, k)));
    }
  });
  result.largest = block_reduce(result.largest, shared, Largest<T>());
  T squares = 0;
  for_runs<S, kCount>(row, [&](const Run<S, kCount>& run, int64_t) {
    for (int k = 0; k < kCount; ++k) {
      const T v = result.reduced(value(run, k));
      squares += v * v;
    }
  });
  result.norm = sqrt(block_reduce(squares, shared, Sum<T>()));
  return result;
}

template <typename T>
struct Budget {
  T eps, step, lo, hi;
};

template <typename S, int kCount>
__device__ void l2_step_row(const Row<S>& row, const Budget<typename S::Wide>& budget,
                            typename S::Wide* shared) {
  typedef typename S::Wide T;
  typedef Run<S, kCount> R;
  const auto gradient = [=](const R& run, int k) { return S::widen(run.grad.at[k]); };
  const Direction<T> along = direction_of<S, kCount>(row, shared, gradient);
  if (along.largest != along.largest) return;
  const auto moved = [=](const R& run, int k) {
    return S::widen(run.x.at[k]) + budget.step * along(gradient(run, k));
  };
  const auto offset = [=](const R& run, int k) {
    return moved(run, k) - S::widen(run.origin.at[k]);
  };
  const Direction<T> outward = direction_of<S, kCount>(row, shared, offset);
  const bool inside = outward.length() <= budget.eps;
  for_runs<S, kCount>(row, [=](const R& run, int64_t i) {
    Pack<S, kCount> out;
    for (int k = 0; k < kCount; ++k) {
      const T projected = S::widen(run.origin.at[k]) + budget.eps * outward(offset(run, k));
      const T to = inside ? moved(run, k) : projected;
      out.at[k] = S::narrow(at_most(at_least(to, budget.lo), budget.hi));
    }
    store_pack<S, kCount>(row.x + i, out);
  });
}

template <typename S, int kCount>
__global__ void l2_step_kernel(typename S::Element* x, const typename S::Element* grad,
                               const typename S::Element* origin, int64_t rows, int64_t size,
                               Budget<typename S::Wide> budget) {
  WCMI_SHARED(typename S::Wide, shared, kThreads / 32);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t at = row * size;
    l2_step_row<S, kCount>({x + at, grad + at, origin + at, size}, budget, shared);
  }
}

template <typename S>
int launch(void* x, const void* grad, const void* origin, int64_t rows, int64_t size, double eps,
           double step_size, double lo, double hi, cudaStream_t stream) {
  typedef typename S::Element E;
  typedef typename S::Wide T;
  constexpr int kCount = pack_size<S>();
  const Budget<T> budget = {static_cast<T>(eps), static_cast<T>(step_size), static_cast<T>(lo),
                            static_cast<T>(hi)};
  const bool vector = aligned(x) && aligned(grad) && aligned(origin) && size % kCount == 0;
  const auto kernel = vector ? l2_step_kernel<S, kCount> : l2_step_kernel<S, 1>;
  WCMI_LAUNCH(kernel, blocks_for(rows, 1), kThreads, 0, stream, static_cast<E*>(x),
              static_cast<const E*>(grad), static_cast<const E*>(origin), rows, size, budget);
  return cudaGetLastError();
}

}  // namespace

int l2_step_cuda(void* x, const void* grad, const void* origin, int64_t rows, int64_t size,
                 int dtype, double eps, double step_size, double lo, double hi, int device,
                 void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (rows == 0 || size == 0) return cudaSuccess;
  return for_storage(dtype, [=](auto storage) {
    return launch<decltype(storage)>(x, grad, origin, rows, size, eps, step_size, lo, hi,
                                     static_cast<cudaStream_t>(stream));
  });
}

}  // namespace wcmi
