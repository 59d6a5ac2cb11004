#define WCMI_LEVEL avx512
#define WCMI_VECTOR_BYTES 64
#include "critic_tail-inl.h"
