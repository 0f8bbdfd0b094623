#!/usr/bin/env bash
# Shows what each fix changes, on copies of a checkout of the published library: its regression test fails without the fix and passes with it.
# Then, with all the fixes that were asked for, all regression tests pass, and the test files of the library that exercise the same code fail
# nowhere where they did not fail before. Everything runs on the CPU.
#
#   PYTHON=python3 docs/upstream/check.sh CHECKOUT [FIX...]
#
# PYTHON     an interpreter with torch, pytest, einops, scipy, accelerate and the published wheel of bitsandbytes. Nothing is compiled: the
#            native CPU library of that wheel is put beside the Python sources of the checkout, so the two should be of about the same age.
#            With transformers installed, the companion change for it is checked as well, on a copy of the installed package.
# SELECTION  which tests of the library's own files are run, as an expression for pytest's -k; "not compile" by default, "" for all of them. What
#            is marked as benchmark, slow or deprecated is left out, as in the library's own configuration.
# FIX        names of folders here; all of them by default. With one name, the library's own tests run with that fix alone.
#
# The result is 0 if everything is as it should be.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
checkout=${1:?usage: check.sh CHECKOUT [FIX...]}
shift
python=$(command -v "${PYTHON:-python3}") || { echo "There is no interpreter ${PYTHON:-python3}; set PYTHON." >&2; exit 2; }
selection=(-m "not benchmark and not slow and not deprecated" -k "${SELECTION-not compile}")
fixes=("$@")
if [ ${#fixes[@]} = 0 ]; then for folder in "$here"/[0-9]*/; do fixes+=("$(basename "$folder")"); done; fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export BNB_TEST_DEVICE=cpu PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the tests' tensors are small
wrong=0

say() { printf '%s\n' "$*"; }
fail() { say "  NOT AS IT SHOULD BE: $*"; wrong=1; }

version() { "$python" -c "from importlib.metadata import version; print(version('$1'))"; }
folder_of() { (cd "$work" && "$python" -c "import importlib.util as u; print(u.find_spec('$1').submodule_search_locations[0])"); }

# The header of an edits file: "field: words".
header() { sed -n "s/^$2: //p" "$here/$1/fix.edits"; }

# The words of its input, each once.
words() { tr ' ' '\n' | sort -u; }

# run TREE LOG PYTEST_ARGUMENTS...: pytest with the package of TREE; prints its last line.
run() {
    local tree=$1 log=$2 status=0
    shift 2
    PYTHONPATH=$tree "$python" -m pytest -q --no-header -p no:cacheprovider -W ignore -rfE "$@" > "$log" 2>&1 || status=$?
    sed -n 's/^=* *\([0-9].* in [0-9].*s\)[^s]*$/\1/p' "$log" | tail -1
    return "$status"
}

# regression FIX_TEST TREE LOG: the test runs from a folder of its own, so that no configuration and no package beside it is picked up.
regression() {
    mkdir -p "$work/tests"
    cp "$1" "$work/tests/"
    (cd "$work/tests" && run "$2" "$3" --rootdir "$work/tests" "$(basename "$1")")
}

# before_and_after TEST TREE APPLY...: APPLY is the command that makes the change.
before_and_after() {
    local test=$1 tree=$2 line status=0
    shift 2
    line=$(regression "$test" "$tree" "$work/before.log") || status=$?
    say "  without: $line"
    if [ "$status" = 0 ] && grep -q ' skipped' <<< "$line"; then
        say "  (this machine cannot show the defect)"
    elif [ "$status" != 1 ]; then
        fail "$(basename "$test") was to fail, see below"
        tail -20 "$work/before.log"
    fi
    "$@" || { fail "the edits do not apply"; return; }
    status=0
    line=$(regression "$test" "$tree" "$work/after.log") || status=$?
    say "  with:    $line"
    [ "$status" = 0 ] || { fail "$(basename "$test") was to pass, see below"; tail -40 "$work/after.log"; }
}

failures() { sed -n 's/^\(FAILED\|ERROR\) \([^ ]*\).*/\2/p' "$1" | sort; }

own_tests() {
    local tree=$1 line status=0
    shift
    say "  $*"
    line=$(cd "$tree" && run "$tree" "$work/own.log" "${selection[@]}" "$@") || status=$?
    say "  with:    $line"
    [ "$status" = 0 ] && return
    failures "$work/own.log" > "$work/now"
    if [ ! -s "$work/now" ]; then fail "pytest ended with $status"; tail -20 "$work/own.log"; return; fi
    mapfile -t failing < "$work/now"
    line=$(cd "$work/base" && run "$work/base" "$work/own-before.log" "${failing[@]}") || true
    say "  those that fail, without: $line"
    failures "$work/own-before.log" > "$work/then"
    say "  failing before as well:"
    comm -12 "$work/then" "$work/now" | sed 's/^/    /'
    if [ -n "$(comm -13 "$work/then" "$work/now")" ]; then
        fail "failing only with the fix:"
        comm -13 "$work/then" "$work/now" | sed 's/^/    /'
    fi
}

mkdir "$work/base"
git -C "$checkout" archive HEAD | tar -x -C "$work/base"
cp "$(folder_of bitsandbytes)"/libbitsandbytes_cpu.* "$work/base/bitsandbytes/"
say "checkout $(git -C "$checkout" log -1 --format='%H of %cs'), native library of the installed wheel $(version bitsandbytes)"

for fix in "${fixes[@]}"; do
    say "$fix"
    tree=$work/$fix
    cp -r "$work/base" "$tree"
    for earlier in $(header "$fix" after); do "$python" "$here/apply.py" "$tree" "$here/$earlier/fix.edits"; done
    for test in "$here/$fix"/test_*.py; do
        [[ $test == */test_transformers_* ]] && continue
        before_and_after "$test" "$tree" "$python" "$here/apply.py" "$tree" "$here/$fix/fix.edits"
    done
    if [ -e "$here/$fix/transformers.edits" ]; then
        if package=$(folder_of transformers 2> /dev/null); then
            say "  transformers $(version transformers), with the unchanged library"
            mkdir -p "$work/transformers/src"
            cp -r "$package" "$work/transformers/src/"
            before_and_after "$here/$fix"/test_transformers_*.py "$work/base:$work/transformers/src" \
                "$python" "$here/apply.py" "$work/transformers" "$here/$fix/transformers.edits"
        else
            say "  transformers is not installed: its companion change is not checked"
        fi
    fi
    rm -rf "$tree"
done

say "together: ${fixes[*]}"
cp -r "$work/base" "$work/all"
tests=()
for fix in $(for fix in "${fixes[@]}"; do header "$fix" after; echo "$fix"; done | words); do
    "$python" "$here/apply.py" "$work/all" "$here/$fix/fix.edits" || fail "$fix does not apply after the ones before it"
    for test in "$here/$fix"/test_*.py; do
        [[ $test == */test_transformers_* ]] && continue
        cp "$test" "$work/tests/"
        tests+=("$(basename "$test")")
    done
done
status=0
line=$(cd "$work/tests" && run "$work/all" "$work/all.log" --rootdir "$work/tests" "${tests[@]}") || status=$?
say "  with:    $line"
[ "$status" = 0 ] || { fail "see below"; tail -40 "$work/all.log"; }
say "the library's own tests of the same code"
mapfile -t files < <(for fix in "${fixes[@]}"; do header "$fix" tests; done | words)
own_tests "$work/all" "${files[@]}"

[ "$wrong" = 0 ] && say "everything is as it should be"
exit "$wrong"
