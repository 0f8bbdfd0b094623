#!/usr/bin/env bash
# Builds the native CPU library and its driver under build/, and runs them where Python with PyTorch does not: check.sh plain|emulated|sanitize
#
#   plain      on this machine
#   emulated   on an x86-64 processor without AVX and on two of aarch64, by QEMU's user mode (an x86-64 Linux host; see the packages below)
#   sanitize   with the address and the undefined-behaviour sanitiser; then, where PYTHON is set, Python's own tests of the native library
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SANITIZERS="-g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
PYTHON_TESTS=(tests/test_cpu_isa.py tests/test_cpu_gemm.py tests/test_cpu_int8.py tests/test_cpu_optimizers.py tests/test_hostile_inputs.py)

# build FOLDER COMPILER FLAGS [CMAKE OPTIONS...]: FOLDER/bitsandbytes/libbitsandbytes_cpu.so and FOLDER/driver
build() {
    local folder=$1 compiler=$2 flags=$3
    shift 3
    cmake -S . -B "$folder/cmake" -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_CXX_FLAGS="$flags" -DBNB_OUTPUT_DIRECTORY="$PWD/$folder/bitsandbytes" "$@" \
        >"$folder.log" || { cat "$folder.log"; return 1; }
    cmake --build "$folder/cmake" --parallel "${JOBS:-$(nproc)}" >>"$folder.log" || { tail -n 50 "$folder.log"; return 1; }
    # shellcheck disable=SC2086  (several flags)
    "$compiler" -std=c++17 -O1 -Wall -Wextra -Werror -ffp-contract=off $flags tests/native/driver.cpp -o "$folder/driver" -ldl
}

need() {
    command -v "$1" >/dev/null || { echo "$1 is missing (Debian, Ubuntu: apt install $2)" >&2; exit 2; }
}

check_plain() {
    build build/native c++ ""
    build/native/driver build/native/bitsandbytes/libbitsandbytes_cpu.so
}

check_emulated() {
    need qemu-x86_64-static qemu-user-static
    need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
    [ "$(uname -m)" = x86_64 ] || { echo "this check is for x86-64 hosts" >&2; exit 2; }
    build build/native c++ ""
    qemu-x86_64-static -cpu qemu64 build/native/driver build/native/bitsandbytes/libbitsandbytes_cpu.so --set scalar
    build build/aarch64 aarch64-linux-gnu-g++ "" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64
    for processor in cortex-a57:neon max:neondot; do # without and with the dot product instructions
        qemu-aarch64-static -L /usr/aarch64-linux-gnu -cpu "${processor%:*}" build/aarch64/driver \
            build/aarch64/bitsandbytes/libbitsandbytes_cpu.so --set scalar --set "${processor#*:}"
    done
}

check_sanitize() {
    build build/sanitize c++ "-O1 $SANITIZERS" -DCMAKE_BUILD_TYPE=None
    local library=build/sanitize/bitsandbytes/libbitsandbytes_cpu.so
    build/sanitize/driver "$library"
    build/sanitize/driver "$library" libgomp.so.1 # with threads
    [ -n "${PYTHON:-}" ] || return 0
    # A copy of the package with that library, in a folder of its own: `python -m pytest` looks for packages where it is started, before all else.
    # Python itself leaks on purpose and PyTorch frees what C allocated. What a sanitiser says of the process that it ends must not be captured.
    tar -C bitsandbytes --exclude='*.so' --exclude=__pycache__ -cf - . | tar -C build/sanitize/bitsandbytes -xf -
    local root=$PWD
    cd build/sanitize
    export PYTHONPATH=$PWD ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0
    export LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)"
    "$PYTHON" -c 'import sys; from bitsandbytes import cextension as c; sys.exit(c.lib._lib._name != sys.argv[1])' "$root/$library" \
        || { echo "Python does not load the library with sanitisers" >&2; return 1; }
    "$PYTHON" -m pytest -q -p no:cacheprovider --capture=sys --rootdir "$root" -c "$root/pyproject.toml" "${PYTHON_TESTS[@]/#/$root/}"
}

case "${1:-}" in
plain | emulated | sanitize)
    mkdir -p build
    "check_$1"
    ;;
*)
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
