// The statistics of scores that a thread keeps while scores come in, and the gradient of a score.
// See csrc/kernels.h for what they are, and for their extremes.
#pragma once

#include <math.h>
#include <stdint.h>

#include "launch.h"

namespace wcmi {

// The bits of `which`, wcmi_fast/_ops.py.
enum Statistic { kLse = 1, kSoftplus = 2, kClampedLse = 4, kSum = 8, kSquare = 16 };

// `which` and the (N, P) arrays: the positives, then those of `which`, in the order of its bits.
template <typename T>
struct Arrays {
  T* first;
  int64_t stride;  // N * P
  int which;
};

template <typename T>
__device__ T shift_of(T largest) {
  return isinf(largest) ? T(0) : largest;
}

// What turns a sum of exponentials relative to `from` into one relative to `to`, which is greater.
template <typename T>
__device__ T rescaling(T from, T to) {
  if (from == to) return T(1);
  // Nothing but zeros, or NaN, so far: exp might overflow, and 0 * inf is NaN.
  if (from == -INFINITY) return T(0);
  return exp(shift_of(from) - shift_of(to));
}

template <typename T>
__device__ T clamped(T x, T tau) {
  return x < -tau ? -tau : (x > tau ? tau : x);
}

template <typename T>
struct Running {
  T largest, lse, clamped_lse, softplus, sum, square;
};

template <typename T>
__device__ Running<T> nothing() {
  return {-static_cast<T>(INFINITY), 0, 0, 0, 0, 0};
}

// Raises the maximum to which both sums of exponentials are relative.
template <typename T>
__device__ void raise(Running<T>* own, T largest, T tau) {
  if (!(largest > own->largest)) return;
  own->lse *= rescaling(own->largest, largest);
  own->clamped_lse *= exp(clamped(own->largest, tau) - clamped(largest, tau));
  own->largest = largest;
}

template <typename T>
__device__ void add_score(Running<T>* own, T x, T tau, int which) {
  if (which & (kLse | kClampedLse)) raise(own, x, tau);
  if (which & kLse) own->lse += exp(x - shift_of(own->largest));
  if (which & kClampedLse) own->clamped_lse += exp(clamped(x, tau) - clamped(own->largest, tau));
  if (which & kSoftplus) own->softplus += (x > 0 ? x : T(0)) + log1p(exp(-abs(x)));
  if (which & kSum) own->sum += x;
  if (which & kSquare) own->square += T(0.5) * (abs(x) + 1) * (abs(x) + 1);
}

template <typename T>
__device__ void merge(Running<T>* own, Running<T> other, T tau) {
  raise(own, other.largest, tau);
  raise(&other, own->largest, tau);
  own->lse += other.lse;
  own->clamped_lse += other.clamped_lse;
  own->softplus += other.softplus;
  own->sum += other.sum;
  own->square += other.square;
}

template <typename T>
__device__ void write_statistics(const Running<T>& own, const Arrays<T>& out, int64_t at, T tau) {
  T* to = out.first + out.stride + at;
  const auto put = [&](int statistic, T value) {
    if (!(out.which & statistic)) return;
    *to = value;
    to += out.stride;
  };
  put(kLse, shift_of(own.largest) + log(own.lse));
  put(kSoftplus, own.softplus);
  put(kClampedLse, clamped(own.largest, tau) + log(own.clamped_lse));
  put(kSum, own.sum);
  put(kSquare, own.square);
}

// The gradients of one (i, p)'s statistics.
template <typename T>
struct Slopes {
  T positive, shift, lse, softplus, sum, square;
};

template <typename T>
__device__ Slopes<T> read_slopes(const Arrays<const T>& d, const T* lse, int64_t at) {
  const T* from = d.first + d.stride + at;
  const auto take = [&](int statistic) {
    if (!(d.which & statistic)) return T(0);
    const T value = *from;
    from += d.stride;
    return value;
  };
  Slopes<T> result;
  result.positive = d.first[at];
  result.lse = take(kLse);
  result.softplus = take(kSoftplus);
  take(kClampedLse);
  result.sum = take(kSum);
  result.square = take(kSquare);
  // Where every score is -inf so is lse; the weights are then 0 rather than exp(-inf + inf).
  result.shift = d.which & kLse ? lse[at] : T(0);
  if (result.shift == -INFINITY) result.shift = 0;
  return result;
}

template <typename T>
__device__ T sigmoid(T x) {
  const T e = exp(-abs(x));
  return (x < 0 ? e : T(1)) / (1 + e);
}

// The gradient of a score, of a negative pair.
template <typename T>
__device__ T score_slope(T x, const Slopes<T>& d, int which) {
  T slope = d.sum;
  if (which & kLse) slope += d.lse * exp(x - d.shift);
  if (which & kSoftplus) slope += d.softplus * sigmoid(x);
  if (which & kSquare) slope += d.square * (x > 0 ? x + 1 : (x < 0 ? x - 1 : x));
  return slope;
}

// Merges the states of the threads t, t + apart, t + 2 apart, ... into thread t's, for t < apart,
// in a fixed order. `states` has room for one per thread; every thread of the block must call it.
template <typename T>
__device__ void merge_threads(Running<T>* own, int apart, int threads, T tau, Running<T>* states) {
  const int t = threadIdx.x;
  int half = 1;
  while (half * apart * 2 < threads) half *= 2;
  for (; half > 0; half /= 2) {
    __syncthreads();
    states[t] = *own;
    __syncthreads();
    const int other = t + half * apart;
    if (t < half * apart && other < threads) merge(own, states[other], tau);
  }
}

}  // namespace wcmi
