#define WCMI_LEVEL avx2
#define WCMI_VECTOR_BYTES 32
#include "critic_tail-inl.h"
