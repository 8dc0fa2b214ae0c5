// The sweeps of one element type and head dim: setup.py compiles this file once for each, so that compilers share the work.
#include "sweep.h"

namespace ptv2::cuda {

template int sweep_of<PTV2_ELEMENT, PTV2_HEAD_DIM>(const Attention&, void*);

}  // namespace ptv2::cuda
