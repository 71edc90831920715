// The resident strategy on the CPU: a whole CIFAR-scale SkipNet, images to logits, in one call.
#pragma once

#include <memory>
#include <string>

#include "../engine.h"

namespace skipnet::cpu {

// Packs a network of basic blocks for an instruction set of instruction_sets(); nothing of `weights` is kept.
std::unique_ptr<Engine> make_resident(const NetworkWeights& weights, const std::string& instruction_set);

}  // namespace skipnet::cpu
