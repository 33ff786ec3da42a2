// Support for forked processes. A child has its parent's memory but none of its threads, so a
// mutex that another thread held stays locked in the child forever.
#pragma once

#include <mutex>

namespace rbln_vae {

// Held while the process forks. So data that is only changed under this mutex is consistent in
// the child, where the mutex is free.
std::mutex& fork_guard();

// The number of forks between the start of the program and this process.
int forks();

}  // namespace rbln_vae
