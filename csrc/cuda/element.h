// What activations and convolution weights are made of.
#pragma once

namespace skipnet::cuda {

// tf32 is float32 in memory, in a convolution's products TF32 (10 bits of fraction) on tensor cores.
enum class ElementType { float32, float16, bfloat16, tf32 };

inline int element_bytes(ElementType type) {
    return type == ElementType::float16 || type == ElementType::bfloat16 ? 2 : 4;
}

}  // namespace skipnet::cuda
