#include "common.h"

// Raised with every change to an exported function, together with VERSION in native.py, so that a
// library left over from older sources is told apart.
MOEZOO_API int32_t moezoo_version() { return 12; }
