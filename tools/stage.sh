#!/bin/sh
# A stage of setting up: `sh tools/stage.sh TEXT COMMAND ...` runs the command without a word of its own, and says what
# is being done: on a terminal in one line that counts seconds and is written over by the next stage, elsewhere (a dumb
# terminal, a file) in a line of its own. Where the command fails, what it wrote and its exit status come through.
# `sh tools/stage.sh TEXT` ends the line with a text that stays.
text=$1
shift
moving=
[ -t 1 ] && [ "${TERM:-dumb}" != dumb ] && moving=yes
if [ $# = 0 ]; then
    [ "$moving" ] && printf '\r\033[K%s\n' "$text" || printf '%s\n' "$text"
    exit 0
fi
written=$(mktemp) || exit 1
trap 'rm -f "$written"' EXIT
if [ "$moving" ]; then
    "$@" >"$written" 2>&1 &
    command=$!
    # what runs behind does not hear Ctrl+C
    trap 'kill $command 2>/dev/null; printf "\n"; exit 130' INT TERM HUP
    seconds=0
    while kill -0 $command 2>/dev/null; do
        printf '\r\033[K%s ... %d s' "$text" $seconds
        sleep 1
        seconds=$((seconds + 1))
    done
    wait $command
    status=$?
    [ $status = 0 ] || printf '\n'
else
    printf '%s\n' "$text"
    "$@" >"$written" 2>&1
    status=$?
fi
[ $status = 0 ] || cat "$written" >&2
exit $status
