#define WCMI_LEVEL base
#include "keep_best-inl.h"
