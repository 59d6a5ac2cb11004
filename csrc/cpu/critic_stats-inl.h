// Body of critic_stats, compiled once per instruction set; see kernels.h for what it computes.
// The including file defines WCMI_LEVEL and WCMI_VECTOR_BYTES.
#include <math.h>
#include <stdint.h>

#include "../kernels.h"

namespace wcmi {
namespace WCMI_LEVEL {

#include "vector-inl.h"

// Less work than this is not worth waking a second thread.
static constexpr int64_t kParallelElements = 16384;

template <typename T>
static inline T row_maximum(const T* row, int64_t N) {
  constexpr int kCount = Lanes<T>::kCount;
  Vec<T> best = broadcast(minus_infinity<T>());
  int64_t i = 0;
  for (; i + kCount <= N; i += kCount) {
    const Vec<T> x = load(row + i);
    best = x > best ? x : best;
  }
  if (i < N) {
    const Vec<T> x = load_some(row + i, N - i, minus_infinity<T>());
    best = x > best ? x : best;
  }
  T result = best[0];
  for (int lane = 1; lane < kCount; ++lane) result = best[lane] > result ? best[lane] : result;
  return result;
}

template <typename T>
static inline T row_exp_sum(const T* row, int64_t N, T shift) {
  constexpr int kCount = Lanes<T>::kCount;
  const Vec<T> shifts = broadcast(shift);
  Vec<T> sums = {};
  int64_t i = 0;
  for (; i + kCount <= N; i += kCount) sums += exp_nonpositive<T>(load(row + i) - shifts);
  if (i < N) {
    sums += exp_nonpositive<T>(load_some(row + i, N - i, minus_infinity<T>()) - shifts);
  }
  T result = sums[0];
  for (int lane = 1; lane < kCount; ++lane) result += sums[lane];
  return result;
}

// A row without a finite maximum: all -inf (or NaN), or with a +inf score.
template <typename T>
static T row_exp_sum_infinite(const T* row, int64_t N, T maximum) {
  for (int64_t i = 0; i < N; ++i) {
    if (row[i] != row[i]) return row[i];
  }
  return maximum > 0 ? T(1) : T(0);
}

template <typename T>
static void critic_stats_fwd(T* tile, int64_t first, int64_t images, int64_t N, int64_t P,
                             T* positives, T* row_max, T* row_sum, int threads) {
  const int64_t rows = images * P;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * N > kParallelElements)
  for (int64_t r = 0; r < rows; ++r) {
    T* row = tile + r * N;
    const int64_t at = first * P + r;
    T* diagonal = row + first + r / P;
    positives[at] = *diagonal;
    *diagonal = minus_infinity<T>();
    const T maximum = row_maximum(row, N);
    row_max[at] = maximum;
    row_sum[at] = __builtin_isfinite(maximum) ? row_exp_sum(row, N, maximum)
                                              : row_exp_sum_infinite(row, N, maximum);
  }
}

// One location's log-sum-exp from its N row results, in the order of the images, in double.
template <typename T>
static T location_lse(const T* row_max, const T* row_sum, int64_t N, int64_t P, int zero_diagonal) {
  double shift = zero_diagonal ? 0.0 : minus_infinity<double>();
  for (int64_t j = 0; j < N; ++j) shift = row_max[j * P] > shift ? row_max[j * P] : shift;
  const double offset = __builtin_isfinite(shift) ? shift : 0.0;
  double sum = zero_diagonal ? static_cast<double>(N) * exp(-offset) : 0.0;
  for (int64_t j = 0; j < N; ++j) {
    const double scale = exp(static_cast<double>(row_max[j * P]) - offset);
    // An all-masked row has scale 0 and sum 0; a NaN sum must survive it.
    sum += scale == 0.0 && row_sum[j * P] == row_sum[j * P] ? 0.0 : scale * row_sum[j * P];
  }
  return static_cast<T>(offset + log(sum));
}

template <typename T>
static void critic_stats_lse(const T* row_max, const T* row_sum, int64_t N, int64_t P,
                             int zero_diagonal, T* lse) {
  for (int64_t p = 0; p < P; ++p) {
    lse[p] = location_lse(row_max + p, row_sum + p, N, P, zero_diagonal);
  }
}

template <typename T>
static inline void row_grad(const T* row, int64_t N, T lse, T dlse, T* grad) {
  constexpr int kCount = Lanes<T>::kCount;
  // Where every score is -inf so is lse; the weights are then 0 rather than exp(-inf + inf).
  const Vec<T> shifts = broadcast(lse == minus_infinity<T>() ? T(0) : lse);
  int64_t i = 0;
  for (; i + kCount <= N; i += kCount) {
    store<T>(grad + i, dlse * exp_nonpositive<T>(load(row + i) - shifts));
  }
  if (i < N) {
    const Vec<T> x = load_some(row + i, N - i, minus_infinity<T>());
    store_some<T>(grad + i, N - i, dlse * exp_nonpositive<T>(x - shifts));
  }
}

template <typename T>
static void critic_stats_bwd(const T* tile, int64_t first, int64_t images, int64_t N, int64_t P,
                             const T* lse, const T* dpositives, const T* dlse, T* grad,
                             int threads) {
  const int64_t rows = images * P;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * N > kParallelElements)
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t p = r % P;
    row_grad(tile + r * N, N, lse[p], dlse[p], grad + r * N);
    grad[r * N + first + r / P] = dpositives[first * P + r];
  }
}

void fill_critic_stats(CpuKernels* kernels) {
  kernels->critic_stats_fwd_f32 = critic_stats_fwd<float>;
  kernels->critic_stats_fwd_f64 = critic_stats_fwd<double>;
  kernels->critic_stats_lse_f32 = critic_stats_lse<float>;
  kernels->critic_stats_lse_f64 = critic_stats_lse<double>;
  kernels->critic_stats_bwd_f32 = critic_stats_bwd<float>;
  kernels->critic_stats_bwd_f64 = critic_stats_bwd<double>;
}

}  // namespace WCMI_LEVEL
}  // namespace wcmi
