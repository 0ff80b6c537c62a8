// Stacked results, a part for each group, in memory that the system has not handed out yet.

#include "memory.h"

using namespace moezoo;

// Asks at once for the pages behind a buffer that is about to be written.
MOEZOO_API void moezoo_about_to_write(void* data, int64_t bytes, int32_t) {
  populate(data, bytes);
}

// Fills the parts of groups without a row with zeros; group e's rows are ends[e - 1] … ends[e].
MOEZOO_API void moezoo_zero_empty_groups(void* data, int64_t bytes_each, const int64_t* ends,
                                         int64_t groups, int32_t) {
  char* const parts = static_cast<char*>(data);
  int64_t first = 0;  // of the empty groups that follow one another
  for (int64_t e = 0; e <= groups; ++e) {
    if (e < groups && ends[e] == (e ? ends[e - 1] : 0)) continue;
    zero(parts + first * bytes_each, (e - first) * bytes_each);
    first = e + 1;
  }
}
