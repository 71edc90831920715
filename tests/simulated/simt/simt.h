// Runs CUDA sources on the CPU, to be proved right where there is no GPU. How a source is run here: README.md.
//
// What hardware leaves undefined is made to show:
//   - shared memory starts out as NaN and lies against a page that may not be touched, and so do the arrays of a test;
//   - cp.async fills its destination with NaN and copies only when its group is waited for;
//   - what a thread block leaves to others with __stcg is NaN to them, read by __ldcg, until a fence on each side;
//   - what is stored to another thread block of a cluster is NaN there until somebody waits for it, and comes in any
//   order;
//   - a barrier that not all threads reach, or reach at different lines, a warp operation that lanes of its mask do not
//     take part in, and threads that wait for ever are errors that say who waits where.
//
// Each lower file includes what it needs of those above it:
//   cuda_types.h      CUDA's keywords, vector types and built-in variables
//   site.h            a place in a source, and what a test takes out there
//   error.h           what went wrong
//   guarded_memory.h  poisoned memory between pages that fault
//   grid.h            threads, thread blocks, clusters, and who waits
//   weak_memory.h     which stores a thread may count on
//   scheduler.h       fibers and their order
//   barriers.h  shared_memory.h  async_copy.h  bank_conflicts.h  cluster_stores.h  warp.h  tensor_cores.h  atomics.h
//   cuda_functions.h  __syncthreads and the like
//   exports.h         what Python calls
#pragma once

#include "async_copy.h"
#include "bank_conflicts.h"
#include "cluster_stores.h"
#include "cuda_functions.h"
#include "exports.h"
#include "tensor_cores.h"
