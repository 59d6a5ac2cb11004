// Body of critic_stats, compiled once per instruction set; see kernels.h for what it computes.
// The including file defines WCMI_LEVEL and WCMI_VECTOR_BYTES.
#include <math.h>
#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "../kernels.h"

namespace wcmi {
namespace WCMI_LEVEL {

#include "vector-inl.h"

// Less work than this is not worth waking a second thread.
static constexpr int64_t kParallelElements = 16384;

static inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// A row of a tile repeats its P locations once per image, and vectors run over it regardless of
// where an image ends. What belongs to a location is therefore kept in a ring: entry k belongs to
// location k % P, a vector that starts at column c uses the entries from c % size on, and the ring
// is longer than its period by one vector. At least four vectors long, it also gives a small P as
// many independent sums.
template <typename T>
struct Ring {
  static constexpr int kCount = Lanes<T>::kCount;
  int64_t P;
  int64_t size;    // a multiple of P
  int64_t length;  // size and one vector more

  explicit Ring(int64_t locations)
      : P(locations),
        size(locations * ((4 * kCount + locations - 1) / locations)),
        length(size + kCount) {}

  int64_t next(int64_t at) const { return at + kCount < size ? at + kCount : at + kCount - size; }

  void expand(const T* values, T* ring) const {
    for (int64_t k = 0, p = 0; k < length; ++k, p = p + 1 == P ? 0 : p + 1) ring[k] = values[p];
  }

  void fill(T* ring, T value) const {
    for (int64_t k = 0; k < length; ++k) ring[k] = value;
  }

  template <typename Combine>
  void fold(const T* ring, T* values, Combine combine) const {
    for (int64_t p = 0; p < P; ++p) values[p] = ring[p];
    for (int64_t k = P, p = 0; k < length; ++k, p = p + 1 == P ? 0 : p + 1) {
      values[p] = combine(values[p], ring[k]);
    }
  }
};

// sums[k] = combine(sums[k], term(score, k)) over columns that begin with location 0.
template <typename T, typename Term, typename Combine>
static inline void reduce(const T* row, int64_t columns, const Ring<T>& ring, T* sums, Term term,
                          Combine combine) {
  constexpr int kCount = Lanes<T>::kCount;
  int64_t c = 0;
  int64_t at = 0;
  for (; c + kCount <= columns; c += kCount, at = ring.next(at)) {
    store<T>(sums + at, combine(load(sums + at), term(load(row + c), at)));
  }
  if (c < columns) {
    const Vec<T> old = load(sums + at);
    const Vec<T> next = combine(old, term(load_some(row + c, columns - c, T(0)), at));
    store_some<T>(sums + at, columns - c, next);
  }
}

// grad[c] = term(score, k), or that added to it.
template <bool kAdd, typename T, typename Term>
static inline void map(const T* row, int64_t columns, const Ring<T>& ring, T* grad, Term term) {
  constexpr int kCount = Lanes<T>::kCount;
  int64_t c = 0;
  int64_t at = 0;
  for (; c + kCount <= columns; c += kCount, at = ring.next(at)) {
    const Vec<T> value = term(load(row + c), at);
    store<T>(grad + c, kAdd ? load(grad + c) + value : value);
  }
  if (c < columns) {
    const Vec<T> value = term(load_some(row + c, columns - c, T(0)), at);
    const Vec<T> old = load_some(grad + c, columns - c, T(0));
    store_some<T>(grad + c, columns - c, kAdd ? old + value : value);
  }
}

// The columns of one row without those of its own image: two runs, each beginning at location 0.
struct Run {
  int64_t first;
  int64_t columns;
};

template <typename T>
struct OffDiagonal {
  Run runs[2];
  int64_t own;  // first column of the own image, -1 where it is in another tile

  OffDiagonal(const CriticStatsTile<T>& tile, int64_t i) {
    const int64_t columns = tile.images * tile.P;
    const bool here = i >= tile.first_image && i < tile.first_image + tile.images;
    own = here ? (i - tile.first_image) * tile.P : -1;
    runs[0] = {0, here ? own : columns};
    runs[1] = here ? Run{own + tile.P, columns - own - tile.P} : Run{0, 0};
  }
};

template <typename T, typename Term>
static inline void add_up(const T* row, const OffDiagonal<T>& off, const Ring<T>& ring, T* sums,
                          Term term) {
  ring.fill(sums, T(0));
  for (const Run& run : off.runs) {
    reduce(row + run.first, run.columns, ring, sums, term,
           [](Vec<T> a, Vec<T> b) { return a + b; });
  }
}

// Adds the row's sums per location to `total`.
template <typename T, typename Term>
static inline void add_statistic(const T* row, const OffDiagonal<T>& off, const Ring<T>& ring,
                                 T* sums, T* folded, T* total, Term term) {
  add_up(row, off, ring, sums, term);
  ring.fold(sums, folded, [](T a, T b) { return a + b; });
  for (int64_t p = 0; p < ring.P; ++p) total[p] += folded[p];
}

template <typename T>
static inline T finite_or_zero(T x) {
  return __builtin_isfinite(x) ? x : T(0);
}

template <typename T>
static inline T clamped(T x, T tau) {
  return x < -tau ? -tau : (x > tau ? tau : x);
}

template <typename T>
static inline Vec<T> clamped_lanes(Vec<T> x, T tau) {
  const Vec<T> low = broadcast(-tau);
  const Vec<T> high = broadcast(tau);
  x = x < low ? low : x;
  return x > high ? high : x;
}

// A location whose maximum is +inf: its sum is 1 unless a score is NaN.
template <typename T>
static T infinite_sum(const T* row, const OffDiagonal<T>& off, int64_t P, int64_t p) {
  for (const Run& run : off.runs) {
    for (int64_t c = p; c < run.columns; c += P) {
      if (row[run.first + c] != row[run.first + c]) return row[run.first + c];
    }
  }
  return T(1);
}

// sum[p] <- sum[p] exp(old[p] - now[p]) + added[p]: sums of exponentials relative to `now`.
template <typename T>
static inline void rescale_and_add(T* sum, const T* old, const T* now, const T* added, int64_t P) {
  constexpr int kCount = Lanes<T>::kCount;
  for (int64_t p = 0; p < P; p += kCount) {
    const int64_t count = P - p < kCount ? P - p : kCount;
    const bool whole = count == kCount;
    const Vec<T> from = whole ? load(old + p) : load_some(old + p, count, T(0));
    const Vec<T> to = whole ? load(now + p) : load_some(now + p, count, T(0));
    const Vec<T> before = whole ? load(sum + p) : load_some(sum + p, count, T(0));
    const Vec<T> more = whole ? load(added + p) : load_some(added + p, count, T(0));
    // Both -inf: nothing but zeros so far.
    const Vec<T> scale = from == to ? broadcast(T(1)) : exp_nonpositive<T>(from - to);
    const Vec<T> result = before * scale + more;
    if (whole) {
      store<T>(sum + p, result);
    } else {
      store_some<T>(sum + p, count, result);
    }
  }
}

// Rings and arrays of P that one thread works with; see critic_stats_workspace.
template <typename T>
struct Workspace {
  T* sums;
  T* shifts;
  T* folded;
  T* maxima;
  T* clamped_before;
  T* clamped_now;

  Workspace(T* from, int64_t P) {
    const int64_t length = critic_stats_workspace(P) / 6;
    sums = from + thread_index() * 6 * length;
    shifts = sums + length;
    folded = shifts + length;
    maxima = folded + length;
    clamped_before = maxima + length;
    clamped_now = clamped_before + length;
  }
};

template <typename T>
static void row_maxima(const T* row, const OffDiagonal<T>& off, const Ring<T>& ring,
                       const T* before, const Workspace<T>& work) {
  ring.fill(work.sums, minus_infinity<T>());
  for (const Run& run : off.runs) {
    reduce(
        row + run.first, run.columns, ring, work.sums, [](Vec<T> x, int64_t) { return x; },
        [](Vec<T> a, Vec<T> b) { return b > a ? b : a; });
  }
  ring.fold(work.sums, work.maxima, [](T a, T b) { return b > a ? b : a; });
  for (int64_t p = 0; p < ring.P; ++p) {
    if (before[p] > work.maxima[p]) work.maxima[p] = before[p];
  }
}

// Running sums of exp(T - maximum) for the maxima in `work`, which become the row's.
template <typename T>
static void row_lse(const T* row, const OffDiagonal<T>& off, const Ring<T>& ring, T* row_max,
                    T* sum, const Workspace<T>& work) {
  for (int64_t p = 0; p < ring.P; ++p) work.folded[p] = finite_or_zero(work.maxima[p]);
  ring.expand(work.folded, work.shifts);
  add_up(row, off, ring, work.sums,
         [&](Vec<T> x, int64_t at) { return exp_nonpositive<T>(x - load(work.shifts + at)); });
  ring.fold(work.sums, work.folded, [](T a, T b) { return a + b; });
  for (int64_t p = 0; p < ring.P; ++p) {
    if (work.maxima[p] == -minus_infinity<T>()) {
      work.folded[p] = infinite_sum(row, off, ring.P, p);
      sum[p] = sum[p] == sum[p] ? T(0) : sum[p];
    }
  }
  rescale_and_add(sum, row_max, work.maxima, work.folded, ring.P);
}

// The same for scores clamped to [-tau, tau]: clamping keeps the order, hence the maxima.
template <typename T>
static void row_clamped_lse(const T* row, const OffDiagonal<T>& off, const Ring<T>& ring,
                            const T* row_max, T tau, T* sum, const Workspace<T>& work) {
  for (int64_t p = 0; p < ring.P; ++p) {
    work.clamped_before[p] = clamped(row_max[p], tau);
    work.clamped_now[p] = clamped(work.maxima[p], tau);
  }
  ring.expand(work.clamped_now, work.shifts);
  add_up(row, off, ring, work.sums, [&](Vec<T> x, int64_t at) {
    return exp_nonpositive<T>(clamped_lanes<T>(x, tau) - load(work.shifts + at));
  });
  ring.fold(work.sums, work.folded, [](T a, T b) { return a + b; });
  rescale_and_add(sum, work.clamped_before, work.clamped_now, work.folded, ring.P);
}

template <typename T>
static void forward_row(const T* row, const OffDiagonal<T>& off, const Ring<T>& ring,
                        const CriticStatsArrays<T>& out, T tau, const Workspace<T>& work) {
  if (off.own >= 0) {
    for (int64_t p = 0; p < ring.P; ++p) out.positives[p] = row[off.own + p];
  }
  if (out.lse || out.clamped_lse) row_maxima(row, off, ring, out.row_max, work);
  if (out.clamped_lse) row_clamped_lse(row, off, ring, out.row_max, tau, out.clamped_lse, work);
  if (out.lse) row_lse(row, off, ring, out.row_max, out.lse, work);
  if (out.lse || out.clamped_lse) {
    for (int64_t p = 0; p < ring.P; ++p) out.row_max[p] = work.maxima[p];
  }
  if (out.softplus) {
    add_statistic(row, off, ring, work.sums, work.folded, out.softplus,
                  [](Vec<T> x, int64_t) { return softplus<T>(x); });
  }
  if (out.sum) {
    add_statistic(row, off, ring, work.sums, work.folded, out.sum,
                  [](Vec<T> x, int64_t) { return x; });
  }
  if (out.square) {
    add_statistic(row, off, ring, work.sums, work.folded, out.square, [](Vec<T> x, int64_t) {
      const Vec<T> y = magnitude<T>(x) + T(1);
      return T(0.5) * y * y;
    });
  }
}

template <typename T>
static void clear_row(const CriticStatsArrays<T>& out, int64_t P) {
  T* const sums[] = {out.lse, out.softplus, out.clamped_lse, out.sum, out.square};
  for (T* array : sums) {
    for (int64_t p = 0; array && p < P; ++p) array[p] = T(0);
  }
  for (int64_t p = 0; p < P; ++p) out.row_max[p] = minus_infinity<T>();
}

// The arrays of one row out of whole (N, P) ones.
template <typename T>
static inline CriticStatsArrays<T> row_of(const CriticStatsArrays<T>& all, int64_t at) {
  const auto shifted = [at](T* array) { return array ? array + at : array; };
  return {shifted(all.positives),   shifted(all.row_max), shifted(all.lse),   shifted(all.softplus),
          shifted(all.clamped_lse), shifted(all.sum),     shifted(all.square)};
}

template <typename T>
static void critic_stats_fwd(const CriticStatsTile<T>& tile, const CriticStatsArrays<T>& out,
                             double tau, T* workspace, int threads) {
  const int64_t columns = tile.images * tile.P;
  const Ring<T> ring(tile.P);
#pragma omp parallel num_threads(threads) if (tile.rows * columns > kParallelElements)
  {
    const Workspace<T> work(workspace, tile.P);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t i = tile.first_row + r;
      const CriticStatsArrays<T> own = row_of(out, i * tile.P);
      if (tile.first_image == 0) clear_row(own, tile.P);
      forward_row(tile.scores + r * columns, OffDiagonal<T>(tile, i), ring, own,
                  static_cast<T>(tau), work);
    }
  }
}

template <typename T>
static void critic_stats_finish(const CriticStatsArrays<T>& out, int64_t count, double tau,
                                int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > kParallelElements)
  for (int64_t k = 0; k < count; ++k) {
    const double shift = out.row_max[k];
    if (out.lse) {
      out.lse[k] = static_cast<T>(finite_or_zero(shift) + log(static_cast<double>(out.lse[k])));
      if (shift > 0 && !__builtin_isfinite(shift) && out.lse[k] == out.lse[k]) {
        out.lse[k] = static_cast<T>(shift);
      }
    }
    if (out.clamped_lse) {
      const double sum = out.clamped_lse[k];
      out.clamped_lse[k] = static_cast<T>(clamped(shift, tau) + log(sum));
    }
  }
}

// One location's log-sum-exp over i, in double and in a fixed order, with its gradient.
template <typename T>
static double location_lse(const T* lse, int64_t N, int64_t P, bool zero_diagonal, T* dlse) {
  double largest = zero_diagonal ? 0.0 : minus_infinity<double>();
  for (int64_t i = 0; i < N; ++i) largest = lse[i * P] > largest ? lse[i * P] : largest;
  const double shift = finite_or_zero(largest);
  double sum = zero_diagonal ? static_cast<double>(N) * exp(-shift) : 0.0;
  for (int64_t i = 0; i < N; ++i) sum += exp(lse[i * P] - shift);
  for (int64_t i = 0; i < N; ++i) {
    // Where every score is -inf the weight is 0 and not 0 / 0.
    const bool none = lse[i * P] == minus_infinity<T>();
    dlse[i * P] = none ? T(0) : static_cast<T>(-exp(lse[i * P] - shift) / (sum * P));
  }
  return shift + log(sum);
}

template <typename T>
static void dv_value(const T* positives, const T* lse, int64_t N, int64_t P, bool zero_diagonal,
                     T* value, T* dlse) {
  double total = 0;
  for (int64_t k = 0; k < N * P; ++k) total += positives[k];
  total /= N;
  for (int64_t p = 0; p < P; ++p) {
    total -= location_lse(lse + p, N, P, zero_diagonal, dlse + p);
  }
  *value = static_cast<T>(total / P + log(static_cast<double>(N) * (N - 1)));
}

// Each term's gradient into `grad`, the first written, the others added.
template <typename T, typename Term>
static inline void put(const T* row, const OffDiagonal<T>& off, const Ring<T>& ring, T* grad,
                       bool add, Term term) {
  for (const Run& run : off.runs) {
    if (add) {
      map<true>(row + run.first, run.columns, ring, grad + run.first, term);
    } else {
      map<false>(row + run.first, run.columns, ring, grad + run.first, term);
    }
  }
}

template <typename T>
static void backward_row(const T* row, const OffDiagonal<T>& off, const Ring<T>& ring, const T* lse,
                         const CriticStatsArrays<T>& d, T* grad, const Workspace<T>& work) {
  T* scale = work.sums;
  bool add = false;
  if (d.lse) {
    // Where every score is -inf so is lse; the weights are then 0 rather than exp(-inf + inf).
    for (int64_t p = 0; p < ring.P; ++p) {
      work.folded[p] = lse[p] == minus_infinity<T>() ? T(0) : lse[p];
    }
    ring.expand(work.folded, work.shifts);
    ring.expand(d.lse, scale);
    put(row, off, ring, grad, add, [&](Vec<T> x, int64_t at) {
      return load(scale + at) * exp_nonpositive<T>(x - load(work.shifts + at));
    });
    add = true;
  }
  if (d.softplus) {
    ring.expand(d.softplus, scale);
    put(row, off, ring, grad, add,
        [&](Vec<T> x, int64_t at) { return load(scale + at) * sigmoid<T>(x); });
    add = true;
  }
  if (d.sum) {
    ring.expand(d.sum, scale);
    put(row, off, ring, grad, add, [&](Vec<T>, int64_t at) { return load(scale + at); });
    add = true;
  }
  if (d.square) {
    ring.expand(d.square, scale);
    put(row, off, ring, grad, add, [&](Vec<T> x, int64_t at) {
      const Vec<T> slope = x > T(0) ? x + T(1) : (x < T(0) ? x - T(1) : x);
      return load(scale + at) * slope;
    });
    add = true;
  }
  if (!add) {
    put(row, off, ring, grad, add, [](Vec<T>, int64_t) { return Vec<T>{}; });
  }
  if (off.own >= 0) {
    for (int64_t p = 0; p < ring.P; ++p) grad[off.own + p] = d.positives[p];
  }
}

template <typename T>
static void critic_stats_bwd(const CriticStatsTile<T>& tile, const T* lse,
                             const CriticStatsArrays<T>& d, T* grad, T* workspace, int threads) {
  const int64_t columns = tile.images * tile.P;
  const Ring<T> ring(tile.P);
#pragma omp parallel num_threads(threads) if (tile.rows * columns > kParallelElements)
  {
    const Workspace<T> work(workspace, tile.P);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t i = tile.first_row + r;
      const int64_t at = i * tile.P;
      backward_row(tile.scores + r * columns, OffDiagonal<T>(tile, i), ring, lse ? lse + at : lse,
                   row_of(d, at), grad + r * columns, work);
    }
  }
}

template <typename T>
static CriticStatsKernels<T> critic_stats_kernels() {
  return {critic_stats_fwd<T>, critic_stats_finish<T>, dv_value<T>, critic_stats_bwd<T>};
}

void fill_critic_stats(CpuKernels* kernels) {
  kernels->critic_stats_f32 = critic_stats_kernels<float>();
  kernels->critic_stats_f64 = critic_stats_kernels<double>();
}

}  // namespace WCMI_LEVEL
}  // namespace wcmi
