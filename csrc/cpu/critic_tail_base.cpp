#define WCMI_LEVEL base
#define WCMI_VECTOR_BYTES 16
#include "critic_tail-inl.h"
