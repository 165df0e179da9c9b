#!/bin/sh
# Gives an empty volume the demo store, then becomes the command. Knows two folders, not what is in them.
set -eu

shipped=/usr/share/brainstacks/demo-store
store=$BRAINSTACKS_STORE__PATH
unfinished=$store.unfinished

# A store mounted at exactly this path is the operator's own: nothing can be renamed onto a mount.
if [ -z "$(ls -A "$store" 2>/dev/null)" ] && ! mountpoint -q "$store"; then
    rm -rf "$unfinished"
    cp -R "$shipped" "$unfinished"
    sync -f "$unfinished"
    mv -T "$unfinished" "$store"  # Renamed last, so a start that was killed leaves no half store.
    echo "demo store copied to $store" >&2
fi
exec "$@"
