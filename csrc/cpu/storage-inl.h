// Storage types of an attack's tensors: how an element is widened to the type that its arithmetic
// is done in, and narrowed, as torch rounds it. Included inside namespace wcmi::<level>, so that no
// symbol is shared between levels.

template <typename To, typename From>
static inline To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

// One of two words without a branch, which the compiler would thread into the loop around it and
// then not vectorise.
static inline uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// A storage type's element, the type that its arithmetic is done in, and the ways between them.
struct Float32 {
  typedef float Element;
  typedef float Wide;
  static inline Wide widen(Element x) { return x; }
  static inline Element narrow(Wide x) { return x; }
};

struct Float64 {
  typedef double Element;
  typedef double Wide;
  static inline Wide widen(Element x) { return x; }
  static inline Element narrow(Wide x) { return x; }
};

struct BFloat16 {
  typedef uint16_t Element;
  typedef float Wide;
  static inline Wide widen(Element x) { return bits_of<float>(static_cast<uint32_t>(x) << 16); }
  static inline Element narrow(Wide x) {
    const uint32_t bits = bits_of<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<Element>(choose((bits & 0x7fffffffu) > 0x7f800000u, 0x7fc0u, rounded));
  }
};

struct Float16 {
  typedef uint16_t Element;
  typedef float Wide;
  static inline Wide widen(Element x) {
    const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fffu) << 13;
    const uint32_t exponent = magnitude & 0x0f800000u;
    const uint32_t rebias = choose(exponent == 0x0f800000u, (255u - 31u) << 23, (127u - 15u) << 23);
    // A subnormal: with the exponent of 2^-14 the hidden bit is one too many; subtract it.
    const float subnormal = bits_of<float>(magnitude + (113u << 23)) - bits_of<float>(113u << 23);
    const uint32_t value = choose(exponent == 0, bits_of<uint32_t>(subnormal), magnitude + rebias);
    return bits_of<float>(value | (static_cast<uint32_t>(x & 0x8000u) << 16));
  }
  static inline Element narrow(Wide x) {
    const uint32_t bits = bits_of<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 puts a subnormal half's bits, correctly rounded, at the bottom of the mantissa.
    const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t value = magnitude < 0x38800000u ? subnormal : normal;
    value = magnitude >= 0x477ff000u ? 0x7c00u : value;
    value = magnitude > 0x7f800000u ? 0x7e00u : value;
    return static_cast<Element>(value | sign);
  }
};

template <typename S>
static inline typename S::Wide rounded(typename S::Wide x) {
  return S::widen(S::narrow(x));
}

// Maximum and minimum, one instruction each: a NaN x stays, a NaN bound counts as none.
template <typename T>
static inline T at_least(T x, T bound) {
  return bound > x ? bound : x;
}

template <typename T>
static inline T at_most(T x, T bound) {
  return bound < x ? bound : x;
}
