#define WCMI_LEVEL avx2
#include "keep_best-inl.h"
