// What the lanes of a warp do together. A lane of the mask that does not take part is an error.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

namespace simt {

// The lanes of `mask` meet. Each leaves a slot; the last one to come calls complete(slots), slots[lane] null outside
// of the mask, and they all go on.
template <typename Complete>
void collective(unsigned mask, const char* what, void* slot, Site site, Complete complete) {
    Fiber* self = machine.current;
    Block& block = *self->block;
    const int lane = self->lane();
    if (!(mask >> lane & 1)) machine.fail(text(what, ": the mask leaves out the calling lane ", lane), site);
    const int lanes = std::min(warpSize, block.threads - self->linear / warpSize * warpSize);
    if (lanes < warpSize && mask >> lanes) machine.fail(text(what, ": the mask names lanes that do not exist"), site);
    auto& pending = block.warps[self->linear / warpSize];
    auto open = std::find_if(pending.begin(), pending.end(), [&](const Collective& one) { return one.mask & mask; });
    if (open == pending.end()) {
        pending.push_back({mask, 0, what, site, {}, {}});
        open = pending.end() - 1;
    }
    if (open->mask != mask || open->what != what || !(open->site == site))
        machine.fail(text(what, ": other lanes of the warp are in ", open->what, " at ", open->site.text()), site);
    open->arrived |= 1u << lane;
    open->slots[lane] = slot;
    open->fibers[lane] = self;
    if (open->arrived != mask) return machine.wait(what, site);
    const Collective all = *open;
    pending.erase(open);
    complete(all.slots);
    for (Fiber* fiber : all.fibers)
        if (fiber && fiber != self) machine.wake(fiber);
    machine.yield(false);
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const char* what, Site site) {
    static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    struct Slot {
        T value, result;
        int source;
    } slot{value, value, source};
    collective(mask, what, &slot, site, [](void* const* slots) {
        for (int lane = 0; lane < warpSize; ++lane) {
            if (!slots[lane]) continue;
            Slot& to = *static_cast<Slot*>(slots[lane]);
            if (to.source < 0 || to.source >= warpSize || !slots[to.source])
                std::memset(&to.result, kPoison, sizeof(T));  // undefined on hardware
            else
                to.result = static_cast<Slot*>(slots[to.source])->value;
        }
    });
    return slot.result;
}

inline unsigned ballot(unsigned mask, bool predicate, const char* what, Site site) {
    struct Slot {
        bool predicate;
        unsigned result;
    } slot{predicate, 0};
    collective(mask, what, &slot, site, [](void* const* slots) {
        unsigned result = 0;
        for (int lane = 0; lane < warpSize; ++lane)
            if (slots[lane] && static_cast<Slot*>(slots[lane])->predicate) result |= 1u << lane;
        for (int lane = 0; lane < warpSize; ++lane)
            if (slots[lane]) static_cast<Slot*>(slots[lane])->result = result;
    });
    return slot.result;
}

}  // namespace simt
