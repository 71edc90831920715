// Workspaces that calls are done with; included by sources that are compiled once for each instruction set.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

namespace skipnet::cpu {
namespace {

// Made once, reused from call to call: as many as there have been calls at a time.
template <typename Workspace>
class WorkspacePool {
public:
    // One that nobody uses, or null.
    std::unique_ptr<Workspace> acquire() {
        std::lock_guard<std::mutex> lock(mutex_);
        if (idle_.empty()) return nullptr;
        std::unique_ptr<Workspace> space = std::move(idle_.back());
        idle_.pop_back();
        return space;
    }

    void release(std::unique_ptr<Workspace> space) {
        std::lock_guard<std::mutex> lock(mutex_);
        idle_.push_back(std::move(space));
    }

private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Workspace>> idle_;  // under mutex_
};

}  // namespace
}  // namespace skipnet::cpu
