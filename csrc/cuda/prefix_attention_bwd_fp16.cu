// The sweeps of fp16, apart from those of bf16 so that two compilers share the work.
#include "sweep.h"

namespace ptv2::cuda {

template int backward_of<Fp16>(const Attention&, void*);

}  // namespace ptv2::cuda
