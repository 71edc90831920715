// Names for what is compiled once for each instruction set: SKIPNET_VARIANT(run) is run_avx2, for one.
#pragma once

#define SKIPNET_JOIN_(name, isa) name##_##isa
#define SKIPNET_JOIN(name, isa) SKIPNET_JOIN_(name, isa)
#define SKIPNET_VARIANT(name) SKIPNET_JOIN(name, SKIPNET_ISA)
