"""The tables of the storage manager: the migration from schema version 1 to 2.

Their meaning is described where they are used: `contents`, `files`, `filewords`, `spaces`, `uploads`, `mounts`.
"""

FILES = """
    CREATE TABLE contents(id INTEGER PRIMARY KEY AUTOINCREMENT, hash BLOB NOT NULL UNIQUE, size INTEGER NOT NULL,
                          data BLOB, file BLOB);
    CREATE TABLE content_uses(owner INTEGER NOT NULL REFERENCES owners(id),
                              content INTEGER NOT NULL REFERENCES contents(id),
                              uses INTEGER NOT NULL, PRIMARY KEY(owner, content)) WITHOUT ROWID;
    CREATE INDEX content_users ON content_uses(content);
    CREATE TABLE file_bytes(owner INTEGER PRIMARY KEY REFERENCES owners(id), bytes INTEGER NOT NULL);
    CREATE TABLE doomed(hash BLOB PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE files(id INTEGER PRIMARY KEY AUTOINCREMENT, owner INTEGER NOT NULL REFERENCES owners(id),
                       path TEXT NOT NULL, version INTEGER NOT NULL, size INTEGER NOT NULL, created REAL NOT NULL,
                       updated REAL NOT NULL, author TEXT NOT NULL, removed REAL, mount INTEGER);
    CREATE UNIQUE INDEX live_files ON files(owner, path) WHERE removed IS NULL;
    CREATE INDEX trash ON files(owner, id) WHERE removed IS NOT NULL;
    CREATE TABLE versions(file INTEGER NOT NULL REFERENCES files(id), number INTEGER NOT NULL, size INTEGER NOT NULL,
                          time REAL NOT NULL, author TEXT NOT NULL, contents TEXT NOT NULL,
                          PRIMARY KEY(file, number));
    CREATE VIRTUAL TABLE file_words USING fts5(owner, path, text, content='', contentless_delete=1,
                                               tokenize='unicode61');
    CREATE TABLE unindexed(file INTEGER PRIMARY KEY);
    CREATE TABLE grants(owner INTEGER NOT NULL REFERENCES owners(id), path TEXT NOT NULL, grantee TEXT NOT NULL,
                        write INTEGER NOT NULL, PRIMARY KEY(owner, path, grantee));
    CREATE INDEX grants_to ON grants(grantee);
    CREATE TABLE uploads(id INTEGER PRIMARY KEY AUTOINCREMENT, peer INTEGER NOT NULL,
                         owner INTEGER NOT NULL REFERENCES owners(id), path TEXT NOT NULL, if_version INTEGER,
                         begun REAL NOT NULL);
    CREATE INDEX uploads_of_peer ON uploads(peer);
    CREATE TABLE upload_pieces(upload INTEGER NOT NULL REFERENCES uploads(id), number INTEGER NOT NULL,
                               size INTEGER NOT NULL, content INTEGER NOT NULL, PRIMARY KEY(upload, number));
    CREATE TABLE mounts(id INTEGER PRIMARY KEY AUTOINCREMENT, owner INTEGER NOT NULL REFERENCES owners(id),
                        at TEXT NOT NULL, folder BLOB NOT NULL, write INTEGER NOT NULL, UNIQUE(owner, at));
    CREATE TABLE mounted(file INTEGER PRIMARY KEY REFERENCES files(id), mount INTEGER NOT NULL, folder BLOB NOT NULL,
                         name BLOB NOT NULL, stamp TEXT NOT NULL, UNIQUE(mount, folder, name));
"""
