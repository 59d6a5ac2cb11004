#define WCMI_LEVEL avx512
#include "keep_best-inl.h"
