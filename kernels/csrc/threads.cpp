// The OpenMP runtime that the kernels run on (see kernel.h), and the digest of the sources.
#include "kernel.h"

namespace fastmim {

OpenMP openmp{};

static Status use_openmp(void* parallel, void* thread, void* team) {
  openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(parallel);
  openmp.thread = reinterpret_cast<decltype(openmp.thread)>(thread);
  openmp.team = reinterpret_cast<decltype(openmp.team)>(team);
  return OK;
}

}  // namespace fastmim

FASTMIM_EXPORT(use_openmp)

#ifdef FASTMIM_SOURCES
extern "C" {
__attribute__((visibility("default"))) extern const char fastmim_sources[];
const char fastmim_sources[] = FASTMIM_SOURCES;
}
#endif
