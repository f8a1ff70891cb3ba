#!/bin/sh
# Found a consortium of four in fresh volumes, as four operators and a founder would do it by hand. Run again, it changes nothing.
set -eu
members="hospital-01 insurer-02 hospital-03 insurer-04"
nodes=${NODES:-/nodes}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -e "$nodes/hospital-01/genesis.medshard" ]; then
    echo "the consortium is founded already"
else
    for name in $members; do
        [ -e "$nodes/$name/keys" ] || storenode --home "$nodes/$name" init \
            --institution "$name" --url "https://$name:9700" --listen 0.0.0.0:9700 --capacity "${CAPACITY:-20GB}"
        # Prometheus asks from another container of the same private network.
        sed -i -e '/^\[metrics\]/,/^\[log\]/s/^listen = .*/listen = "0.0.0.0:9701"/' \
            -e 's/^# allow_remote = false/allow_remote = true/' "$nodes/$name/config.toml"
        cp "$nodes/$name/$name.card" "$work/"
    done
    storenode genesis "$work"/*.card --sequencer hospital-01 -o "$work/genesis.medshard"
    # The first member comes last: its genesis file says that all have theirs.
    for name in insurer-02 hospital-03 insurer-04 hospital-01; do
        storenode --home "$nodes/$name" adopt "$work/genesis.medshard"
    done
fi
[ "$(id -u)" != 0 ] || for name in $members; do chown -R 10001:10001 "$nodes/$name"; done
