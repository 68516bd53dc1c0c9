#include "cusparselt/api.h"

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <mutex>

namespace slidejax::cusparselt {
namespace {

std::atomic<const Api*> loaded{nullptr};

// Returns the library at `path`, or nullptr and the reason.
std::unique_ptr<Api> Open(const std::string& path, std::string& reason) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* error = dlerror();
    reason = error != nullptr ? error : path + " cannot be loaded";
    return nullptr;
  }
  auto api = std::make_unique<Api>();
  api->path = path;
  const auto find = [&](const char* name) {
    void* symbol = dlsym(library, name);
    if (symbol == nullptr && reason.empty()) reason = path + " lacks the function " + name;
    return symbol;
  };
#define SLIDEJAX_FIND(name, parameters) \
  api->name = reinterpret_cast<Status(*) parameters>(find("cusparseLt" #name));
  SLIDEJAX_CUSPARSELT_FUNCTIONS(SLIDEJAX_FIND)
#undef SLIDEJAX_FIND
  api->GetErrorString = reinterpret_cast<const char* (*)(Status)>(find("cusparseLtGetErrorString"));
  if (reason.empty()) {
    constexpr libraryPropertyType kParts[] = {MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL};
    for (int i = 0; i < 3; ++i) api->GetProperty(kParts[i], &api->version[i]);
    const int minor = api->version[1];
    if (api->version[0] == kMajor && minor >= kOldestMinor && minor <= kNewestMinor) return api;
    reason = path + " is cuSPARSELt " + std::to_string(api->version[0]) + "." +
             std::to_string(minor) + ", and this build of slidejax works with " +
             std::to_string(kMajor) + "." + std::to_string(kOldestMinor) + " to " +
             std::to_string(kMajor) + "." + std::to_string(kNewestMinor);
  }
  dlclose(library);
  return nullptr;
}

}  // namespace

std::string Load(const std::vector<std::string>& candidates) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (Loaded() != nullptr) return "";
  std::string reasons;
  for (const std::string& path : candidates) {
    std::string reason;
    if (std::unique_ptr<Api> api = Open(path, reason)) {
      // The library is never unloaded, because plans live until the process ends.
      loaded.store(api.release(), std::memory_order_release);
      return "";
    }
    reasons += (reasons.empty() ? "" : "; ") + reason;
  }
  return reasons.empty() ? "no candidates" : reasons;
}

const Api* Loaded() { return loaded.load(std::memory_order_acquire); }

std::string Describe(Status status) {
  const Api* api = Loaded();
  return "status " + std::to_string(status) +
         (api != nullptr ? std::string(" (") + api->GetErrorString(status) + ")" : "");
}

}  // namespace slidejax::cusparselt
