// Body of critic_tail, compiled once per instruction set; see kernels.h for what it computes.
// The including file defines WCMI_LEVEL and WCMI_VECTOR_BYTES.
#include <math.h>
#include <stdint.h>

#include "../kernels.h"

namespace wcmi {
namespace WCMI_LEVEL {

#include "vector-inl.h"

static constexpr int64_t kParallelElements = 16384;

template <typename T>
static inline T lanes_sum(Vec<T> x) {
  T sum = x[0];
  for (int lane = 1; lane < Lanes<T>::kCount; ++lane) sum += x[lane];
  return sum;
}

// The sum of term(c) over vectors of columns, in four chains; `rest(c)` gives a column at the end.
template <typename T, typename Term, typename Rest>
static inline T columns_sum(int64_t columns, Term term, Rest rest) {
  constexpr int kCount = Lanes<T>::kCount;
  Vec<T> sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * kCount <= columns; c += 4 * kCount) {
    for (int k = 0; k < 4; ++k) sums[k] += term(c + k * kCount);
  }
  for (; c + kCount <= columns; c += kCount) sums[0] += term(c);
  T total = lanes_sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; c < columns; ++c) total += rest(c);
  return total;
}

template <typename T, typename Term, typename Rest>
static inline void columns_write(T* to, int64_t columns, Term term, Rest rest) {
  constexpr int kCount = Lanes<T>::kCount;
  int64_t c = 0;
  for (; c + kCount <= columns; c += kCount) store<T>(to + c, term(c));
  for (; c < columns; ++c) to[c] = rest(c);
}

template <typename T>
static void normalise_row(T* row, int64_t U, const T* bias, double eps, T* rstd) {
  columns_write<T>(
      row, U, [&](int64_t c) { return load(row + c) + load(bias + c); },
      [&](int64_t c) { return row[c] + bias[c]; });
  const T rough =
      columns_sum<T>(
          U, [&](int64_t c) { return load(row + c); }, [&](int64_t c) { return row[c]; }) /
      static_cast<T>(U);
  // A sum of values far from 0 has lost what their differences from its mean still show.
  const T mean = rough + columns_sum<T>(
                             U, [&](int64_t c) { return load(row + c) - rough; },
                             [&](int64_t c) { return row[c] - rough; }) /
                             static_cast<T>(U);
  const T squares = columns_sum<T>(
      U,
      [&](int64_t c) {
        const Vec<T> x = load(row + c) - mean;
        return x * x;
      },
      [&](int64_t c) { return (row[c] - mean) * (row[c] - mean); });
  *rstd = static_cast<T>(1.0 / sqrt(static_cast<double>(squares) / U + eps));
  const T scale = *rstd;
  columns_write<T>(
      row, U, [&](int64_t c) { return (load(row + c) - mean) * scale; },
      [&](int64_t c) { return (row[c] - mean) * scale; });
}

template <typename T>
static void critic_tail_fwd(T* rows, int64_t stride, int64_t count, int64_t U, const T* bias,
                            double eps, T* rstd, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count * U > kParallelElements)
  for (int64_t r = 0; r < count; ++r) {
    T* row = rows + r * stride;
    normalise_row(row, U, bias, eps, rstd + r);
    for (int64_t c = U; c < stride; ++c) row[c] = c == U ? T(1) : T(0);
  }
}

template <typename T>
static void backward_row(const T* d, const T* x, int64_t U, T rstd, T* out) {
  const T mean_d = columns_sum<T>(
                       U, [&](int64_t c) { return load(d + c); }, [&](int64_t c) { return d[c]; }) /
                   static_cast<T>(U);
  const T mean_dx = columns_sum<T>(
                        U, [&](int64_t c) { return load(d + c) * load(x + c); },
                        [&](int64_t c) { return d[c] * x[c]; }) /
                    static_cast<T>(U);
  columns_write<T>(
      out, U, [&](int64_t c) { return rstd * (load(d + c) - mean_d - load(x + c) * mean_dx); },
      [&](int64_t c) { return rstd * (d[c] - mean_d - x[c] * mean_dx); });
}

template <typename T>
static void critic_tail_bwd(const T* d, const T* rows, int64_t stride, int64_t count, int64_t U,
                            const T* rstd, T* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count * U > kParallelElements)
  for (int64_t r = 0; r < count; ++r) {
    backward_row(d + r * stride, rows + r * stride, U, rstd[r], out + r * U);
  }
}

void fill_critic_tail(CpuKernels* kernels) {
  kernels->critic_tail_f32 = {critic_tail_fwd<float>, critic_tail_bwd<float>};
  kernels->critic_tail_f64 = {critic_tail_fwd<double>, critic_tail_bwd<double>};
}

}  // namespace WCMI_LEVEL
}  // namespace wcmi
