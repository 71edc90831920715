// The compacted strategy on the CPU: a whole ImageNet-scale SkipNet in one call, block by block on the executing
// images.
#pragma once

#include <memory>
#include <string>

#include "../engine.h"

namespace skipnet::cpu {

// Packs any network for an instruction set of instruction_sets(); nothing of `weights` is kept.
std::unique_ptr<Engine> make_compacted(const NetworkWeights& weights, const std::string& instruction_set);

}  // namespace skipnet::cpu
