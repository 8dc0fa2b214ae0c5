// From a call's element type and head dim to the templates compiled for them.
#pragma once

#include <type_traits>

#include "tile.h"

namespace ptv2::cuda {

// f(element, head dim), both as values whose types are constants; INVALID_VALUE where no kernel has the head dim.
template <class Function>
int dispatch(const Attention& a, Function f) {
  auto of = [&](auto element) -> int {
    switch (a.D) {
      case 32: return f(element, std::integral_constant<int, 32>());
      case 64: return f(element, std::integral_constant<int, 64>());
      case 80: return f(element, std::integral_constant<int, 80>());
      case 96: return f(element, std::integral_constant<int, 96>());
      case 128: return f(element, std::integral_constant<int, 128>());
      default: return INVALID_VALUE;
    }
  };
  return a.element == Element::bf16 ? of(Bf16()) : of(Fp16());
}

}  // namespace ptv2::cuda
