// Vectors of the level's width by the compiler's vector extension: one body for x86 and arm64.
// Included inside namespace wcmi::<level>, so that no symbol is shared between levels. No STL here:
// a weak std:: symbol from an AVX-512 file could replace the baseline's copy at link time.

template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(WCMI_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(WCMI_VECTOR_BYTES)));
  typedef float Unaligned
      __attribute__((vector_size(WCMI_VECTOR_BYTES), aligned(alignof(float)), may_alias));
  static constexpr int kCount = WCMI_VECTOR_BYTES / sizeof(float);
  static constexpr int kMantissaBits = 23;
  static constexpr float kRoundingMagic = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kExpUnderflow = -87.3365447f;  // below it exp is not a normal number
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;

  // exp(r) for |r| <= log(2)/2; coefficients of Cephes' expf.
  static inline V exp_reduced(V r) {
    V p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * (r * r) + r + 1.0f;
  }
};

template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(WCMI_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(WCMI_VECTOR_BYTES)));
  typedef double Unaligned
      __attribute__((vector_size(WCMI_VECTOR_BYTES), aligned(alignof(double)), may_alias));
  static constexpr int kCount = WCMI_VECTOR_BYTES / sizeof(double);
  static constexpr int kMantissaBits = 52;
  static constexpr double kRoundingMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kExpUnderflow = -708.39641853226408;
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;

  // exp(r) for |r| <= log(2)/2; the rational form of Cephes' exp.
  static inline V exp_reduced(V r) {
    const V rr = r * r;
    V p = 1.26177193074810590878e-4 * rr + 3.02994407707441961300e-2;
    p = (p * rr + 9.99999999999999999910e-1) * r;
    V q = 3.00198505138664455042e-6 * rr + 2.52448340349684104192e-3;
    q = q * rr + 2.27265548208155028766e-1;
    q = q * rr + 2.00000000000000000005e0;
    return 1.0 + 2.0 * (p / (q - p));
  }
};

template <typename T>
using Vec = typename Lanes<T>::V;

template <typename T>
static inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

template <typename T>
static inline Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(from);
}

template <typename T>
static inline void store(T* to, Vec<T> value) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(to) = value;
}

// The first `count` < kCount elements, the other lanes `fill`.
template <typename T>
static inline Vec<T> load_some(const T* from, int64_t count, T fill) {
  Vec<T> value = broadcast(fill);
  for (int64_t lane = 0; lane < count; ++lane) value[lane] = from[lane];
  return value;
}

template <typename T>
static inline void store_some(T* to, int64_t count, Vec<T> value) {
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = value[lane];
}

template <typename T>
static inline T minus_infinity() {
  return -static_cast<T>(__builtin_inf());
}

// exp(x) for x <= 0, and a little above. Results below the smallest normal number are 0; NaN stays.
template <typename T>
static inline Vec<T> exp_nonpositive(Vec<T> x) {
  using L = Lanes<T>;
  using I = typename L::I;
  const Vec<T> shifted = x * static_cast<T>(1.44269504088896340736) + L::kRoundingMagic;
  const Vec<T> n = shifted - L::kRoundingMagic;
  const Vec<T> r = (x - n * L::kLn2High) - n * L::kLn2Low;
  // The low bits of `shifted` are the integer n: added to the exponent they multiply by 2^n.
  // A cast between vector types of one size keeps the bits.
  const I scaled = (I)L::exp_reduced(r) + ((I)shifted << L::kMantissaBits);
  const Vec<T> value = (Vec<T>)scaled;
  const Vec<T> normal = x < L::kExpUnderflow ? Vec<T>{} : value;
  return x == x ? normal : x;
}

template <typename T>
static inline Vec<T> magnitude(Vec<T> x) {
  return x < T(0) ? -x : x;
}

// log(1 + e) for 0 <= e <= 1, to full relative accuracy: 2 artanh(s) with s = e / (2 + e) <= 1/3.
template <typename T>
static inline Vec<T> log1p_unit(Vec<T> e) {
  constexpr int kTerms = sizeof(T) == 4 ? 8 : 17;  // s^(2 kTerms + 1) is below the rounding error
  const Vec<T> s = e / (T(2) + e);
  const Vec<T> ss = s * s;
  Vec<T> series = broadcast(T(1) / T(2 * kTerms - 1));
  for (int k = kTerms - 1; k > 0; --k) series = series * ss + T(1) / T(2 * k - 1);
  return T(2) * s * series;
}

// log(1 + exp(x)).
template <typename T>
static inline Vec<T> softplus(Vec<T> x) {
  const Vec<T> positive = x > T(0) ? x : Vec<T>{};
  const Vec<T> value = positive + log1p_unit<T>(exp_nonpositive<T>(-magnitude<T>(x)));
  return x == x ? value : x;
}

// 1 / (1 + exp(-x)).
template <typename T>
static inline Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_nonpositive<T>(-magnitude<T>(x));
  const Vec<T> numerator = x < T(0) ? e : broadcast(T(1));
  return numerator / (T(1) + e);
}
