#!/bin/sh
# Fills empty volumes with what the image brings, then becomes the command. Knows folders, not what is in them.
set -eu

shipped=/usr/share/brainstacks
store=$BRAINSTACKS_STORE__PATH
unfinished=$store.unfinished

# A store mounted at exactly this path is the operator's own: nothing can be renamed onto a mount.
if [ -z "$(ls -A "$store" 2>/dev/null)" ] && ! mountpoint -q "$store"; then
    rm -rf "$unfinished"
    cp -R "$shipped/demo-store" "$unfinished"
    sync -f "$unfinished"
    mv -T "$unfinished" "$store"  # Renamed last, so a start that was killed leaves no half store.
    echo "demo store copied to $store" >&2
fi

# The CUDA image's ready-made module; in the CPU image the folder is empty.
if [ -n "$(ls -A "$shipped/triton")" ]; then
    mkdir -p "$TRITON_CACHE_DIR"
    cp -RuT "$shipped/triton" "$TRITON_CACHE_DIR"
fi
exec "$@"
