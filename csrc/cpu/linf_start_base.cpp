#define WCMI_LEVEL base
#include "linf_start-inl.h"
