// Where Winograd's F(4x4, 3x3) interpolates, in every layout: at 0, +-a, +-b and infinity. The customary +-1 and +-2
// round worse by a factor of two; docs/numerics.md.
#pragma once

namespace skipnet::cpu {
namespace {

constexpr float kA = 0.625f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

}  // namespace
}  // namespace skipnet::cpu
