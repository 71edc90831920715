// Matrices in the fragments of a warp's lanes, laid out as the PTX ISA says.
#pragma once

#include <cstdint>
#include <cstring>

#include "shared_memory.h"
#include "warp.h"

namespace simt {

// Of ldmatrix: how often the eight rows of a matrix came, and how often two different ones from the same four banks.
inline int ldmatrix_phases = 0, ldmatrix_conflicts = 0;

// Whether eight rows of 16 bytes lie in different banks, but for rows that are one.
inline bool conflict(void* const* rows) {
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < i; ++j) {
            const auto a = reinterpret_cast<std::uintptr_t>(rows[i]), b = reinterpret_cast<std::uintptr_t>(rows[j]);
            if (a != b && a / 16 % 8 == b / 16 % 8) return true;
        }
    return false;
}

// ldmatrix.x4: four 8x8 matrices of 16-bit values; lane 8 j + r holds the address of row r of matrix j.
inline void ldmatrix_x4(const void* row, unsigned* result, Site site) {
    struct Slot {
        const void* row;
        unsigned* result;
    } slot{row, result};
    check_shared(row, 16, "ldmatrix", site);
    collective(~0u, "ldmatrix", &slot, site, [](void* const* slots) {
        const SharedMemoryOpen open;
        for (int matrix = 0; matrix < 4; ++matrix) {
            void* rows[8];
            for (int row = 0; row < 8; ++row)
                rows[row] = const_cast<void*>(static_cast<const Slot*>(slots[8 * matrix + row])->row);
            ++ldmatrix_phases;
            ldmatrix_conflicts += conflict(rows);
            for (int lane = 0; lane < warpSize; ++lane) {
                const Slot& holder = *static_cast<Slot*>(slots[8 * matrix + lane / 4]);
                std::memcpy(static_cast<Slot*>(slots[lane])->result + matrix,
                            static_cast<const unsigned char*>(holder.row) + lane % 4 * 4, 4);
            }
        }
    });
}

// What a lane brings to an mma.sync: its fragments of d, a and b, laid out as the PTX ISA says.
struct Fragments {
    float* d;
    const unsigned *a, *b;
};

// d += lhs rhs; d's layout does not depend on K.
template <int K>
void add_products(void* const* slots, const float (&lhs)[16][K], const float (&rhs)[K][8]) {
    float sums[16][8] = {};
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < K; ++k)
            for (int column = 0; column < 8; ++column) sums[row][column] += lhs[row][k] * rhs[k][column];
    for (int lane = 0; lane < warpSize; ++lane) {
        float* to = static_cast<Fragments*>(slots[lane])->d;
        const int group = lane / 4, pair = lane % 4 * 2;
        to[0] += sums[group][pair];
        to[1] += sums[group][pair + 1];
        to[2] += sums[group + 8][pair];
        to[3] += sums[group + 8][pair + 1];
    }
}

// mma.sync.m16n8k8, d = a b + d, of values with TF32's 10 bits of fraction: their products are exact in float32.
inline void mma_m16n8k8_tf32(float* d, const unsigned* a, const unsigned* b, Site site) {
    Fragments own{d, a, b};
    for (int i = 0; i < 4; ++i)
        if (a[i] & 0x1fff || b[i % 2] & 0x1fff) machine.fail("mma.sync: an operand has not been rounded to TF32", site);
    collective(~0u, "mma.sync", &own, site, [](void* const* slots) {
        const auto as_float = [](unsigned bits) {
            float value;
            std::memcpy(&value, &bits, sizeof value);
            return value;
        };
        float lhs[16][8], rhs[8][8];
        for (int lane = 0; lane < warpSize; ++lane) {
            const Fragments& from = *static_cast<Fragments*>(slots[lane]);
            const int group = lane / 4, place = lane % 4;
            lhs[group][place] = as_float(from.a[0]);
            lhs[group + 8][place] = as_float(from.a[1]);
            lhs[group][place + 4] = as_float(from.a[2]);
            lhs[group + 8][place + 4] = as_float(from.a[3]);
            rhs[place][group] = as_float(from.b[0]);
            rhs[place + 4][group] = as_float(from.b[1]);
        }
        add_products(slots, lhs, rhs);
    });
}

// mma.sync.m16n8k16, d = a b + d. Products of 16-bit values are exact in float32.
template <typename ToFloat>
void mma_m16n8k16(float* d, const unsigned* a, const unsigned* b, ToFloat to_float, Site site) {
    Fragments own{d, a, b};
    collective(~0u, "mma.sync", &own, site, [=](void* const* slots) {
        float lhs[16][16], rhs[16][8];
        for (int lane = 0; lane < warpSize; ++lane) {
            const Fragments& from = *static_cast<Fragments*>(slots[lane]);
            const int group = lane / 4, pair = lane % 4 * 2;
            for (int half = 0; half < 2; ++half) {
                const auto value = [half](unsigned both) { return static_cast<std::uint16_t>(both >> 16 * half); };
                lhs[group][pair + half] = to_float(value(from.a[0]));
                lhs[group + 8][pair + half] = to_float(value(from.a[1]));
                lhs[group][pair + 8 + half] = to_float(value(from.a[2]));
                lhs[group + 8][pair + 8 + half] = to_float(value(from.a[3]));
                rhs[pair + half][group] = to_float(value(from.b[0]));
                rhs[pair + 8 + half][group] = to_float(value(from.b[1]));
            }
        }
        add_products(slots, lhs, rhs);
    });
}

}  // namespace simt
