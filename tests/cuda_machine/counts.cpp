#include "counts.h"

#include <stdlib.h>

#include <fstream>
#include <list>

namespace machine {
namespace {

using Kind = Operand::Kind;

// All launches, written when the process ends.
struct File {
  const char* path = getenv("FN_MACHINE_COUNTS");
  std::list<std::pair<std::string, Launched>> launches;

  ~File() {
    if (!path) return;
    std::ofstream to(path);
    to << "[";
    const char* between = "\n";
    for (const auto& [name, l] : launches) {
      to << between << "{\"kernel\": \"" << name << "\", \"grid\": [" << l.grid[0] << ", " << l.grid[1]
         << "], \"block\": [" << l.block[0] << ", " << l.block[1] << "], \"cluster\": " << l.cluster
         << ", \"shared\": " << l.shared << ", \"blocks\": " << l.blocks << ", \"in_flight\": " << l.in_flight
         << ", \"code\": [";
      const char* comma = "\n";
      for (size_t i = 0; i < l.rows.size(); ++i) {
        const Row& row = l.rows[i];
        if (!row.executed) continue;
        const std::string& text = l.kernel->code[i].text;
        to << comma << "[\"" << text.substr(0, text.find("(*")) << "\", " << row.executed << ", " << row.requests
           << ", " << row.bytes << ", " << row.parts << "]";
        comma = ",\n";
      }
      to << "]}";
      between = ",\n";
    }
    to << "]\n";
  }
};
File& file() {
  static File one;
  return one;
}

// The registers that an instruction reads: a store's are as many as it writes to memory.
bool reads(const Instruction& in, int first, int count) {
  const bool stores = in.opcode[0] == 'S' && in.opcode[1] == 'T';
  for (size_t i = stores ? 0 : 1; i < in.operands.size(); ++i) {
    const Operand& o = in.operands[i];
    if (o.kind == Kind::address && o.base >= first && o.base < first + count) return true;
    if (o.kind != Kind::general || o.index == kZero) continue;
    const int more = stores ? in.has(Mod::QUAD) ? 4 : in.has(Mod::DOUBLE) ? 2 : 1 : 1;
    if (o.index < first + count && first < o.index + more) return true;
  }
  return false;
}

}  // namespace

bool counting() {
  static const bool asked = file().path != nullptr;
  return asked;
}

Launched& count_launch(const std::string& name, Launched next) {
  next.rows.resize(next.kernel->code.size());
  return file().launches.emplace_back(name, std::move(next)).second;
}

void count_step(Warp& w, const Instruction& in) {
  ++file().launches.back().second.rows[in.pc / 16].executed;
  // Loads come back in order: whoever waits for one waits for those before it, too.
  for (size_t i = w.pending.size(); i-- > 0;) {
    if (!reads(in, w.pending[i].first, w.pending[i].count)) continue;
    w.pending.erase(w.pending.begin(), w.pending.begin() + static_cast<long>(i) + 1);
    break;
  }
}

void count_load(Warp& w, const Operand& to, size_t registers, int64_t bytes) {
  w.pending.push_back({to.index, static_cast<int>(registers), bytes});
  int64_t all = 0;
  for (const Pending& load : w.pending) all += load.bytes;
  int64_t& most = file().launches.back().second.in_flight;
  if (all > most) most = all;
}

void count_access(const Instruction& in, int64_t bytes, int64_t parts) {
  Row& row = file().launches.back().second.rows[in.pc / 16];
  ++row.requests;
  row.bytes += bytes;
  row.parts += parts;
}

}  // namespace machine
