#if defined(__aarch64__)
#include "target.h"

#include "int8.h"
#include "matmul.h"
#include "neon.h"

namespace hf_fp8 {

static int always() { return 1; }

extern const Kernels neon = kernels_of<Neon>("neon", always);

}  // namespace hf_fp8
#endif
