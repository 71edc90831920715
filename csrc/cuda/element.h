// What activations and convolution weights are made of.
#pragma once

namespace skipnet::cuda {

enum class ElementType { float32, float16, bfloat16 };

}  // namespace skipnet::cuda
