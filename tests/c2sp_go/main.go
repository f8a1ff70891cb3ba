// Checks an exported log with Go's own code for transparency logs, golang.org/x/mod/sumdb: signatures, every tile up to the root, every
// entry, proofs of inclusion and of consistency. Nothing in here is medshard's but the folder.
//
// On Debian: apt-get install golang-go golang-golang-x-mod-dev, then
// GO111MODULE=off GOPATH=/usr/share/gocode go run tests/c2sp_go/main.go FOLDER
package main

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const (
	height       = 8
	cosignature  = 4 // the type of an Ed25519 key of a cosigner
	provedEveryN = 97
)

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// cosigner verifies cosignature/v1, which sumdb/note leaves to others.
type cosigner struct {
	name string
	hash uint32
	key  ed25519.PublicKey
}

func (c cosigner) Name() string    { return c.name }
func (c cosigner) KeyHash() uint32 { return c.hash }
func (c cosigner) Verify(text, sig []byte) bool {
	if len(sig) != 8+ed25519.SignatureSize {
		return false
	}
	signed := fmt.Sprintf("cosignature/v1\ntime %d\n%s", binary.BigEndian.Uint64(sig), text)
	return ed25519.Verify(c.key, []byte(signed), sig[8:])
}

// folder reads tiles; sumdb's paths name the height, those of tlog-tiles do not.
type folder string

func (f folder) Height() int                     { return height }
func (f folder) SaveTiles([]tlog.Tile, [][]byte) {}
func (f folder) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	var read [][]byte
	for _, tile := range tiles {
		data, err := os.ReadFile(f.path(tile))
		if err != nil {
			return nil, err
		}
		read = append(read, data)
	}
	return read, nil
}

func (f folder) path(tile tlog.Tile) string {
	name := strings.TrimPrefix(tile.Path(), "tile/8/")
	return filepath.Join(string(f), "tile", strings.Replace(name, "data/", "entries/", 1))
}

// verifiers are the log keys and the Ed25519 cosigners of the tlog-policy beside the log.
func (f folder) verifiers() (logs, cosigners []note.Verifier) {
	policy, err := os.ReadFile(filepath.Join(string(f), "policy"))
	must(err)
	for _, line := range strings.Split(string(policy), "\n") {
		words := strings.Fields(line)
		if len(words) == 2 && words[0] == "log" {
			verifier, err := note.NewVerifier(words[1])
			must(err)
			logs = append(logs, verifier)
		}
		if len(words) == 3 && words[0] == "witness" {
			parts := strings.SplitN(words[2], "+", 3)
			key, err := base64.StdEncoding.DecodeString(parts[2])
			must(err)
			hash, err := strconv.ParseUint(parts[1], 16, 32)
			must(err)
			if key[0] == cosignature {
				cosigners = append(cosigners, cosigner{parts[0], uint32(hash), key[1:]})
			}
		}
	}
	return logs, cosigners
}

func main() {
	place := folder(os.Args[1])
	text, err := os.ReadFile(filepath.Join(string(place), "checkpoint"))
	must(err)
	logs, cosigners := place.verifiers()
	_, err = note.Open(text, note.VerifierList(logs...))
	must(err)
	cosigned, err := note.Open(text, note.VerifierList(cosigners...))
	must(err)
	lines := strings.Split(cosigned.Text, "\n")
	size, err := strconv.ParseInt(lines[1], 10, 64)
	must(err)
	root, err := tlog.ParseHash(lines[2])
	must(err)
	hashes := tlog.TileHashReader(tlog.Tree{N: size, Hash: root}, place)
	for start := int64(0); start < size; start += 1 << height {
		entries(place, hashes, start, size, root)
	}
	for _, old := range []int64{1, 2, size / 3, size / 2, size - 1} {
		if old < 1 || old >= size {
			continue
		}
		hash, err := tlog.TreeHash(old, hashes)
		must(err)
		proof, err := tlog.ProveTree(size, old, hashes)
		must(err)
		must(tlog.CheckTree(proof, size, root, old, hash))
	}
	fmt.Printf("%d entries, %d cosigners\n", size, len(cosigned.Sigs))
}

// entries checks one bundle.
func entries(place folder, hashes tlog.HashReader, start, size int64, root tlog.Hash) {
	width := size - start
	if width > 1<<height {
		width = 1 << height
	}
	data, err := os.ReadFile(place.path(tlog.Tile{H: height, L: -1, N: start >> height, W: int(width)}))
	must(err)
	index := start
	for ; len(data) > 0; index++ {
		length := int(binary.BigEndian.Uint16(data))
		hash := tlog.RecordHash(data[2 : 2+length])
		data = data[2+length:]
		known, err := hashes.ReadHashes([]int64{tlog.StoredHashIndex(0, index)})
		must(err)
		if known[0] != hash {
			log.Fatalf("entry %d is not the one in the tree", index)
		}
		if index%provedEveryN == 0 || index == size-1 {
			proof, err := tlog.ProveRecord(size, index, hashes)
			must(err)
			must(tlog.CheckRecord(proof, size, root, index, hash))
		}
	}
	if index != start+width {
		log.Fatalf("the bundle at %d has %d entries", start, index-start)
	}
}
